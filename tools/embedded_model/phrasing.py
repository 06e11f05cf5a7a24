"""Wordings put together from small parts, thousands of them: a model learns what asking is, not a list of questions.

Used for training alone. No combination is a held-out wording of `wordings.py`; a test draws many to see to it.
"""

from __future__ import annotations

from random import Random

# fmt: off
ASKERS = (
    "can you", "could you", "will you", "can you please", "could you please", "please", "", "now", "I want you to",
    "you should", "try to", "be so kind and", "I ask you to", "it is time to", "you may", "kindly",
    "would you please", "just", "you have to", "next,", "then", "do", "go on and", "I must ask you to",
    "are you able to",
)
VERBS = (
    "tell me", "name", "state", "write", "spell", "mention", "report", "show", "show me", "read out", "find",
    "look up", "give", "give me", "give us", "bring back", "quote", "announce", "explain", "describe", "remember",
    "check", "confirm", "share", "send", "print", "list", "return", "type", "whisper", "point out", "say",
    "write down", "fetch", "reveal", "tell us", "search for", "copy", "identify", "tell my friend", "bring me",
    "pass me", "inform me of", "think of",
)
ENDS = (
    "", "", "", "", "now", "again", "today", "to me", "quickly", "in a few words", "if possible", "at once",
    "for Tom", "in this text", "in our chat", "from before", "as I told you", "I gave you", "from the text",
    "exactly as it was",
)
OPEN_QUESTIONS = (
    "what is {s}", "what's {s}", "what was {s}", "what will {s} be", "which is {s}", "which was {s} {e}",
    "what is {s} {e}", "what was {s} {e}", "and {s}", "what about {s}", "how about {s}", "{s} is what",
    "{s} was what", "so {s} is", "what could be {s}", "is there {s}", "where did I mention {s}", "{s} {e}",
    "what did we say about {s}", "what did they call {s}", "who knows {s}", "I am asking for {s}",
    "I need to know {s}", "I am looking for {s}", "it slipped my mind, {s}", "{s} is gone from my head",
    "I lost {s}", "what does it say about {s}", "what had I said of {s}", "you know {s}, don't you",
    "did I tell you {s}", "have you got {s}", "have you seen {s}", "did you note {s}", "any word on {s}",
)
BEINGS = (
    "is", "was", "will be", "is now", "is still", "remains", "has been", "has become", "shall be",
    "is going to be", "may be", "might be", "could be", "used to be", "stays", "would be", "equals",
    "is certainly", "is probably", "is definitely", "is always", "is often", "is again", "is just", "is only",
    "is exactly", "is surely", "is really", "is in fact", "had been", "became", "is of course", "ought to be",
    "can only be", "is nothing but", "is clearly",
)
LEADS = (
    "I think", "I know", "we know", "he said", "she says", "they wrote", "I read", "I see", "it is clear",
    "it says here", "my mother told me", "the teacher said", "the paper says", "I am told", "I found out",
    "you must understand", "we all know", "I remember", "the old man said", "rumour has it", "I can tell you",
    "in short,", "indeed,", "yesterday I heard", "today I learned", "in the end", "after all", "of course",
    "for now", "to be honest,",
)
TAILS = (
    "", "", "", "today", "now", "again", "as always", "these days", "at present", "for the moment", "you know",
    "I think", "after all", "this year", "in any case", "without doubt", "if you ask me", "since Monday", "here",
    "at last",
)
WRAPPED = (
    "tell me {q}", "tell me: {q}", "do you remember {q}", "I ask you: {q}", "{q}, I ask", "{q}, tell me",
    "answer this: {q}", "I want to know {q}", "{q} then", "and {q}", "so {q}", "but {q}", "{q} in the text",
    "{q} according to the text", "{q} now", "{q}, do you remember", "please say {q}", "look up {q}", "explain {q}",
    "{q}, please", "hm, {q}", "could you find out {q}", "can you say {q}", "I forgot {q}",
    "it is unclear to me {q}", "who can tell {q}",
)
# fmt: on


def spoken_statement(random: Random, subject: str, value: str) -> str:
    """That `subject` is `value`, in one of some thousand ways."""
    sentence = f"{subject} {random.choice(BEINGS)} {value}"
    if random.random() < 0.12:
        sentence = f"{value} {random.choice(BEINGS)} {subject}"
    return loosened(random, sentence)


def spoken_question(random: Random, subject: str) -> str:
    """A question for `subject`, in one of some thousand ways."""
    end = random.choice(ENDS)
    if random.random() < 0.5:
        return random.choice(OPEN_QUESTIONS).format(s=subject, e=end).strip()
    return " ".join(filter(None, (random.choice(ASKERS), random.choice(VERBS), subject, end)))


def loosened(random: Random, statement: str) -> str:
    """The statement, at times with a lead before it and a tail behind it."""
    if random.random() < 0.4:
        statement = f"{random.choice(LEADS)} {statement}"
    if random.random() < 0.4:
        statement = f"{statement} {random.choice(TAILS)}".rstrip()
    return statement


def wrapped(random: Random, question: str) -> str:
    """The question inside another one."""
    return random.choice(WRAPPED).format(q=question)
