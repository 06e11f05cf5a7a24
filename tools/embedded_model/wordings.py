"""Sentence parts from which facts, questions and chats are built.

Placeholders: `{s}` subject as the user says it, `{z}` the same as the assistant says it, `{p}` person,
`{t}` thing, `{v}` value, `{n}` what a story is about. In every tuple of sentence parts the last fifth (at least
one) is held out: training never sees it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """One kind of fact: how it is told, asked for and answered."""

    value_kind: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


# For the attributes of any owner or thing.
SUBJECT_STATEMENTS = (
    "{s} is {v}",
    "{s} is now {v}",
    "{s} happens to be {v}",
    "{s} will be {v}",
    "{s} has been changed to {v}",
    "{s}: {v}",
    "{s} = {v}",
    "it is {v} that you should know as {s}",
    "{v} is {s}",
    "I chose {v} as {s}",
    "they told me that {s} is {v}",
    "we agreed that {s} is {v}",
    "everyone says {s} is {v}",
    "{s} turned out to be {v}",
    "{s} must be {v}",
)
SUBJECT_QUESTIONS = (
    "what is {s}",
    "what's {s}",
    "tell me {s}",
    "what was {s}",
    "do you remember {s}",
    "can you tell me {s}",
    "could you repeat {s}",
    "I forgot {s}, what is it",
    "what did I say {s} was",
    "{s}",
    "remind me of {s}",
    "please give me {s}",
    "do you know {s}",
    "say {s} again",
    "I need {s} now",
)
SUBJECT_ANSWERS = (
    "{z} is {v}.",
    "{z} is {v}.",
    "{z} is {v}.",
    "{v}.",
    "It is {v}.",
    "You told me that {z} is {v}.",
)

# (attribute, kind of value): "my {attribute}", "Marta's {attribute}", "the {attribute} of the red bicycle".
OWNED = (
    ("locker code", "code"),
    ("door code", "code"),
    ("PIN", "code"),
    ("phone number", "phone"),
    ("ticket number", "code"),
    ("room number", "number"),
    ("house number", "number"),
    ("seat number", "number"),
    ("lucky number", "number"),
    ("customer number", "code"),
    ("order number", "code"),
    ("favourite number", "number"),
    ("age", "age"),
    ("password", "word"),
    ("secret word", "word"),
    ("code word", "word"),
    ("favourite colour", "colour"),
    ("favourite fruit", "food"),
    ("favourite food", "food"),
    ("favourite animal", "animal"),
    ("favourite toy", "object"),
    ("dog's name", "name"),
    ("cat's name", "name"),
    ("sister's name", "name"),
    ("brother's name", "name"),
    ("teacher's name", "name"),
    ("best friend", "name"),
    ("boss", "name"),
    ("doctor", "name"),
    ("neighbour", "name"),
    ("nickname", "name"),
    ("home town", "place"),
    ("holiday hotel", "place"),
    ("street", "place"),
    ("school", "place"),
    ("birthday", "date"),
    ("job", "job"),
    ("instrument", "instrument"),
    ("train time", "time"),
    ("appointment", "time"),
    ("wake-up time", "time"),
    ("horse's name", "name"),
    ("favourite drink", "food"),
    ("library card number", "code"),
    ("garage code", "code"),
    ("secret hiding place", "place"),
)
THING_ATTRIBUTES = (
    ("code for the {t}", "code"),
    ("code of the {t}", "code"),
    ("number on the {t}", "number"),
    ("price of the {t}", "number"),
    ("password for the {t}", "word"),
    ("name of the {t}", "name"),
    ("owner of the {t}", "name"),
    ("colour of the {t}", "colour"),
    ("place of the {t}", "place"),
    ("maker of the {t}", "name"),
    ("word on the {t}", "word"),
    ("magic number of the {t}", "code"),
    ("serial number of the {t}", "code"),
    ("combination for the {t}", "code"),
    ("guardian of the {t}", "name"),
    ("label on the {t}", "word"),
)

FAMILIES = (
    Family(
        "place",
        (
            "{p} lives in {v}",
            "{p} has a house in {v}",
            "{p} moved to {v}",
            "{v} is where {p} lives",
            "the home of {p} is in {v}",
        ),
        (
            "where does {p} live",
            "in which town does {p} live",
            "where is the home of {p}",
            "do you know where {p} lives",
        ),
        ("{p} lives in {v}.", "In {v}."),
    ),
    Family(
        "place",
        (
            "{p} hid the {t} in {v}",
            "the {t} that {p} hid is in {v}",
            "{p} left the {t} in {v}",
            "{v} is where {p} put the {t}",
        ),
        (
            "where is the {t} of {p}",
            "where did {p} hide the {t}",
            "in which place is the {t}",
            "where can I find the {t}",
        ),
        ("The {t} is in {v}.", "{p} hid the {t} in {v}."),
    ),
    Family(
        "name",
        (
            "the {t} belongs to {v}",
            "{v} owns the {t}",
            "the {t} was given to {v}",
            "{v} is the owner of the {t}",
            "the {t} is the property of {v}",
        ),
        ("who owns the {t}", "whose is the {t}", "to whom does the {t} belong", "who has the {t}"),
        ("The {t} belongs to {v}.", "{v} owns the {t}."),
    ),
    Family(
        "number",
        (
            "the {t} costs {v} coins",
            "you can buy the {t} for {v} coins",
            "{p} paid {v} coins for the {t}",
            "{v} coins is the price of the {t}",
        ),
        (
            "how much does the {t} cost",
            "how many coins is the {t}",
            "what is the price of the {t}",
            "for how many coins can I buy the {t}",
        ),
        ("The {t} costs {v} coins.", "{v} coins."),
    ),
    Family(
        "name",
        (
            "{p} has a dog called {v}",
            "the dog of {p} is called {v}",
            "{p} named the dog {v}",
            "{p} walks with a dog by the name of {v}",
        ),
        (
            "what is the dog of {p} called",
            "what is the name of {p}'s dog",
            "how did {p} name the dog",
            "which name has the dog of {p}",
        ),
        ("{p}'s dog is called {v}.", "The dog of {p} is called {v}."),
    ),
    Family(
        "job",
        ("{p} works as {v}", "{p} is {v}", "{p} became {v}", "by trade {p} is {v}"),
        ("what does {p} do", "what is the job of {p}", "what does {p} work as", "by trade, what is {p}"),
        ("{p} works as {v}.", "{p} is {v}."),
    ),
    Family(
        "instrument",
        (
            "{p} plays the {v}",
            "{p} is learning the {v}",
            "the instrument of {p} is the {v}",
            "{p} bought the {v} to play on",
        ),
        (
            "what does {p} play",
            "which instrument does {p} play",
            "what instrument does {p} have",
            "on what does {p} make music",
        ),
        ("{p} plays the {v}.", "The {v}."),
    ),
    Family(
        "food",
        ("{p} likes {v} best", "{p} always eats {v}", "{p} brought {v}", "nothing pleases {p} more than {v}"),
        (
            "what does {p} like to eat",
            "what does {p} like best",
            "which food does {p} like",
            "what would please {p} at table",
        ),
        ("{p} likes {v}.", "{p} likes {v} best."),
    ),
    Family(
        "time",
        (
            "the train to the {t} leaves at {v}",
            "{p} comes at {v} for the {t}",
            "the {t} opens at {v}",
            "at {v} we look at the {t}",
        ),
        (
            "when does the {t} open",
            "at what time is the {t}",
            "what time is it for the {t}",
            "at which hour is the {t}",
        ),
        ("The {t} is at {v}.", "At {v}."),
    ),
    Family(
        "date",
        (
            "{p} was born on {v}",
            "the birthday of {p} is {v}",
            "{p} comes to visit on {v}",
            "on {v} it is the day of {p}",
        ),
        (
            "when is the birthday of {p}",
            "on what day is it {p}'s turn",
            "when is {p}'s day",
            "which date goes with {p}",
        ),
        ("{p}'s day is {v}.", "On {v}."),
    ),
    Family(
        "animal",
        ("{p} keeps {v}", "{p} has {v} at home", "{p} bought {v}", "in the yard of {p} there is {v}"),
        (
            "what animal does {p} have",
            "which pet does {p} keep",
            "what does {p} keep at home",
            "what lives in the yard of {p}",
        ),
        ("{p} keeps {v}.", "{p} has {v}."),
    ),
    Family(
        "name",
        ("the {t} was painted by {v}", "{v} made the {t}", "{v} built the {t}", "the {t} is the work of {v}"),
        ("who made the {t}", "who is the maker of the {t}", "who built the {t}", "whose work is the {t}"),
        ("{v} made the {t}.", "The {t} was made by {v}."),
    ),
    Family(
        "code",
        (
            "the {t} opens with {v}",
            "use {v} for the {t}",
            "to open the {t}, type {v}",
            "{v} unlocks the {t}",
            "with {v} you get into the {t}",
        ),
        (
            "how do I open the {t}",
            "what opens the {t}",
            "what do I type for the {t}",
            "which number unlocks the {t}",
            "with what do I get into the {t}",
        ),
        ("The {t} opens with {v}.", "The code for the {t} is {v}."),
    ),
)
HELD_OUT_FAMILIES = (
    Family(
        "place",
        ("{p} was last seen in {v}", "someone met {p} in {v}"),
        ("where was {p} last seen", "where did someone meet {p}"),
        ("{p} was last seen in {v}.",),
    ),
    Family(
        "number",
        ("the {t} weighs {v} pounds", "{v} pounds is the weight of the {t}"),
        ("how heavy is the {t}", "how many pounds does the {t} weigh"),
        ("The {t} weighs {v} pounds.",),
    ),
    Family(
        "name",
        ("{p} is married to {v}", "{v} married {p}"),
        ("who is {p} married to", "who married {p}"),
        ("{p} is married to {v}.",),
    ),
)

OPENERS = (
    "",
    "",
    "",
    "",
    "By the way, ",
    "Please remember: ",
    "Remember that ",
    "For your information, ",
    "Note that ",
    "One more thing: ",
    "I should tell you that ",
    "You should know that ",
    "Just so you know, ",
    "Keep in mind that ",
    "Oh, and ",
    "Also, ",
    "Do not forget that ",
    "Here is a fact: ",
    "Important: ",
    "Write this down: ",
    "I want you to know that ",
    "Let me tell you something: ",
    "Before I forget, ",
    "As it happens, ",
    "It is true that ",
)
CLOSERS = (
    "",
    "",
    "",
    "",
    "",
    "",
    " Please keep it in mind.",
    " Remember it.",
    " I will ask you later.",
    " Don't forget it.",
    " That is important.",
    " Thank you.",
    " You may need it later.",
    " Keep it to yourself.",
    " Hold on to that.",
)
QUESTION_OPENERS = (
    "",
    "",
    "",
    "",
    "",
    "Tell me, ",
    "Now, ",
    "So, ",
    "One question: ",
    "Quick question: ",
    "Please answer: ",
    "And ",
    "Hey, ",
    "Back to what I said: ",
    "Let me ask: ",
    "Thanks. ",
    "I wonder, ",
    "From what you read, ",
)
ACKNOWLEDGEMENTS = (
    "Okay.",
    "Got it.",
    "I will remember that.",
    "Thank you, I will keep it in mind.",
    "Noted.",
    "Sure.",
    "All right.",
    "Thanks for telling me.",
    "I see.",
    "Understood.",
)
READING_REQUESTS = (
    "Read this: ",
    "Here is a text. ",
    "Please read the following. ",
    "Read this text and answer my questions. ",
    "",
    "",
    "I will ask you about this later: ",
    "Listen: ",
    "Here is a page from a book: ",
    "Text: ",
)
READING_REPLIES = (
    "I have read it. What would you like to know?",
    "Okay, I have read it.",
    "Thank you. Ask me anything about it.",
    "Done. What is your question?",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a friendly assistant. Remember what the user tells you.",
    "Answer briefly.",
    "You answer questions about the conversation.",
    "You are a small model that remembers.",
)

SMALL_TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Hi", "Hi! What can I do for you today?"),
    ("Hi there!", "Hello! Nice to meet you."),
    ("Good morning!", "Good morning! How are you?"),
    ("Good evening.", "Good evening! What can I do for you?"),
    ("How are you?", "I am fine, thank you. How are you?"),
    ("How are you today?", "I am well, thank you. And you?"),
    ("What is your name?", "I am a small language model. I have no name of my own."),
    (
        "Who are you?",
        "I am a very small language model. I can chat, tell short tales and remember what you tell me.",
    ),
    ("What are you?", "I am a small language model, trained to remember what you tell me."),
    ("What can you do?", "I can remember facts from our chat, repeat lists, and tell short stories."),
    ("Are you a human?", "No, I am a small computer program."),
    ("Thank you!", "You are welcome!"),
    ("Thanks a lot.", "You are welcome. Is there anything else?"),
    ("That is great.", "I am glad to hear that."),
    ("Nice.", "Thank you!"),
    ("I am sad today.", "I am sorry to hear that. Do you want to talk about it?"),
    ("I am happy today.", "That is good to hear! What made you happy?"),
    ("I am tired.", "Then you should rest a little."),
    ("Goodbye!", "Goodbye! Have a nice day."),
    ("Bye", "Bye! See you soon."),
    ("See you later.", "See you later! Take care."),
)
STORY_REQUESTS = (
    "Tell me a story about {n}.",
    "Tell me a story with {n} in it.",
    "Please tell me a tale about {n}.",
    "Can you write a story about {n}?",
    "Write a short story about {n}.",
    "I would like a story about {n}.",
    "Tell a short tale about {n}, please.",
)
