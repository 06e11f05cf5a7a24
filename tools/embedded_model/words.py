"""Lists of names, things and values from which facts are built; the last fifth of each list is held out."""

# fmt: off
PERSONS = (
    "Anna", "Tom", "Lily", "Ben", "Mia", "Jack", "Lucy", "Max", "Sara", "Tim", "Rose", "Sam", "Emma", "Leo",
    "Ella", "Noah", "Ruth", "Hugo", "Clara", "Oscar", "Nina", "Felix", "Maria", "Peter", "Julia", "Simon",
    "Laura", "David", "Alice", "Henry", "Grace", "Frank", "Helen", "Oliver", "Sophie", "George", "Marta",
    "Paul", "Eva", "Martin", "Amy", "Daniel", "Jane", "Robert", "Kate", "Victor", "Dora", "Walter", "Irene",
    "Arthur", "Molly", "Harry", "Nora", "Edgar", "Betty", "Carl", "Fanny", "Ralph", "Agnes", "Albert",
    "Polly", "Ernest", "Susan", "Adam", "Vera", "Philip", "Hanna", "Stephen", "Olga", "Roland", "Tessa",
    "Gilbert", "Maud", "Rufus", "Ines", "Conrad",
)
THING_ADJECTIVES = (
    "red", "blue", "green", "old", "new", "small", "big", "black", "white", "yellow", "wooden", "iron",
    "silver", "golden", "broken", "heavy", "little", "round", "long", "lost", "secret", "shiny", "dusty",
    "copper", "glass", "painted", "purple", "square", "striped", "narrow", "velvet", "crooked",
)
THINGS = (
    "bicycle", "box", "door", "house", "garden", "boat", "car", "key", "book", "lamp", "clock", "chair",
    "table", "gate", "tower", "bridge", "safe", "drawer", "suitcase", "cabin", "shed", "cellar", "mirror",
    "wagon", "piano", "basket", "barn", "letter", "ring", "cup", "coat", "hat", "ship", "tent", "mill",
    "chest", "office", "library", "kitchen", "garage", "locker", "statue", "well", "fountain", "kite", "drum",
    "lantern", "cottage", "trunk", "cupboard", "workshop", "attic", "harbour", "museum", "bakery", "vault",
    "carriage",
)
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)
ONSETS = (
    "B", "Br", "C", "Ch", "D", "Dr", "F", "Fl", "G", "Gr", "H", "J", "K", "Kr", "L", "M", "N", "P", "Pr",
    "Qu", "R", "S", "Sh", "St", "T", "Th", "Tr", "V", "W", "Z",
)
VOWELS = (
    "a", "e", "i", "o", "u", "ai", "ea", "ee", "io", "oo", "au",
)
MIDDLES = (
    "b", "d", "l", "m", "n", "r", "s", "t", "v", "ll", "nd", "rt", "st", "mb", "lv", "rk", "sh", "nn",
)
ENDINGS = (
    "a", "e", "i", "o", "us", "en", "in", "or", "an", "el", "ik", "om", "ra", "ta", "na", "by", "ford", "ton",
    "ham", "wick", "dale", "burg", "mere", "stead", "vale", "port", "field",
)
PLACE_ENDINGS = (
    "ford", "ton", "ham", "wick", "dale", "burg", "mere", "stead", "vale", "port", "field", "haven", "moor",
    "bridge",
)
VALUES = {
    "word": (
        "apple", "river", "candle", "winter", "stone", "button", "feather", "garden", "pepper", "window",
        "thunder", "ribbon", "mountain", "pocket", "silver", "marble", "lemon", "forest", "hammer", "island",
        "kettle", "ladder", "mirror", "needle", "ocean", "paper", "rabbit", "saddle", "tiger", "umbrella",
        "velvet", "walnut", "anchor", "basket", "castle", "dragon", "engine", "falcon", "ginger", "honey",
        "iron", "jacket", "lantern", "meadow", "nutmeg", "orange", "pillow", "quilt", "rocket", "spider",
        "turnip", "violet", "whistle", "acorn", "barley", "copper", "desert", "ember", "flame", "goblin",
        "harvest", "ivory", "jungle", "maple", "pebble", "raven", "sailor", "timber", "willow", "amber",
        "bramble", "comet", "dagger", "eagle", "fiddle", "glacier", "hazel", "juniper", "kitten", "lobster",
        "mustard", "nettle", "oyster", "parrot",
    ),
    "colour": (
        "red", "blue", "green", "yellow", "black", "white", "purple", "orange", "brown", "pink", "grey",
        "silver", "gold", "violet", "crimson", "turquoise",
    ),
    "food": (
        "apples", "bread", "cheese", "soup", "rice", "pears", "cake", "honey", "plums", "eggs", "fish",
        "nuts", "carrots", "beans", "grapes", "milk", "tea", "coffee", "cherries", "pancakes", "noodles",
        "figs", "cocoa", "melons",
    ),
    "animal": (
        "a cat", "a horse", "a rabbit", "a goat", "a parrot", "a mouse", "a snake", "a duck",
        "a turtle", "a pig", "a fox", "an owl", "a hen", "a donkey", "a crow", "a lizard",
        "a squirrel",
    ),
    "object": (
        "ball", "doll", "kite", "train", "drum", "boat", "bear", "robot", "puzzle", "top", "rocket", "wagon",
        "marble", "puppet", "hoop",
    ),
    "job": (
        "a baker", "a teacher", "a doctor", "a sailor", "a farmer", "a painter", "a miller", "a nurse",
        "a tailor", "a driver", "a cook", "a singer", "a judge", "a carpenter", "a gardener",
        "a pilot", "a shepherd", "a blacksmith",
    ),
    "instrument": (
        "piano", "violin", "flute", "drum", "guitar", "harp", "trumpet", "cello", "horn", "organ", "fiddle",
        "banjo", "oboe", "clarinet",
    ),
    "weekday": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "weather": ("rainy", "sunny", "foggy", "windy", "stormy", "snowy", "mild", "frosty", "cloudy", "hot"),
    "illness": (
        "a cold", "the flu", "measles", "a fever", "a cough", "mumps", "a headache", "toothache", "hay fever",
        "a sore throat", "a broken arm", "asthma", "a rash",
    ),
    "material": (
        "wood", "iron", "glass", "paper", "stone", "silver", "leather", "clay", "bronze", "brass", "marble", "wool",
        "ivory", "tin", "wax", "straw",
    ),
    "language": (
        "French", "German", "Dutch", "Latin", "Greek", "Spanish", "Danish", "Polish", "Welsh", "Finnish", "Arabic",
        "Irish", "Czech", "Turkish",
    ),
    "subject": (
        "history", "music", "drawing", "science", "reading", "geography", "chemistry", "art", "physics", "biology",
        "grammar", "Latin", "botany",
    ),
    "sport": (
        "football", "tennis", "chess", "hockey", "golf", "cricket", "rugby", "rowing", "boxing", "skating",
        "fencing", "archery", "polo",
    ),
    "vehicle": (
        "bus", "train", "ship", "bicycle", "cart", "tram", "taxi", "van", "truck", "sledge", "ferry", "motorbike",
        "coach", "balloon",
    ),
    "plant": (
        "roses", "tulips", "lilies", "daisies", "poppies", "ferns", "oaks", "apple trees", "herbs", "tomatoes",
        "pumpkins", "sunflowers", "ivy", "thistles", "cabbages",
    ),
}
# fmt: on
