"""Prompts that ask for a written text."""

import random
from collections.abc import Mapping
from typing import ClassVar

from diffalign.core import Prompt

from .grammar import Grammar

CARRIERS = (
    "a wooden shop sign that says {text}",
    "a neon sign above a bar, it reads {text}",
    "a poster on a brick wall with the words {text}",
    "a blackboard in a classroom on which {text} is written in chalk",
    "the cover of an old book with the title {text}",
    "a coffee mug with {text} printed on it",
    "a birthday cake with {text} written in icing",
    "a road sign beside a country road that says {text}",
    "a T-shirt on a hanger with the print {text}",
    "a handwritten note on a fridge that says {text}",
    "a movie poster with the large title {text}",
    "a banner across a street that reads {text}",
    "graffiti on a concrete wall that says {text}",
    "a newspaper on a table with the headline {text}",
    "a cardboard box labelled {text}",
    "an airport display that shows {text}",
    "a glass door of an office with {text} on it",
    "a postage stamp with the words {text}",
    "a spaceship whose hull carries the name {text}",
    "a small boat in a harbour, its name {text} painted on the side",
    "a wooden board at a trailhead with {text} carved into it",
    "a laptop screen that shows {text} in large letters",
    "a market stall with a paper sign that says {text}",
    "a train at a platform, its display shows {text}",
    "a bottle with a label that reads {text}",
    "a billboard over a highway at dusk with the slogan {text}",
    "a museum plaque under a painting that says {text}",
    "footprints on a beach and {text} written in the sand",
    "a robot that holds up a sheet with {text}",
    "an embroidered cushion with the word or words {text}",
)
SCENES = ("", ", at night", ", in the rain", ", in bright sunlight", ", in autumn", ", in the snow", ", close up", ", seen from afar")
ADJECTIVES = (
    *("Fresh", "Golden", "Silent", "Happy", "Blue", "Wild", "Hidden", "Little", "Ancient", "Brave", "Cold", "Daily", "Electric", "Free"),
    *("Grand", "Humble", "Lucky", "Misty", "New", "Open", "Proud", "Quick", "Royal", "Secret", "Tiny", "Urban", "Velvet", "Warm"),
)
NOUNS = (
    *("Bread", "River", "Garden", "Market", "Coffee", "Harbor", "Library", "Mountain", "Ocean", "Planet", "Museum", "Orchard", "Forest"),
    *("Bakery", "Castle", "Dragon", "Engine", "Flower", "Galaxy", "Island", "Journey", "Kitchen", "Lantern", "Meadow", "Night", "Orbit"),
    *(
        "Palace",
        "Quartz",
        "Rocket",
        "Summer",
        "Theater",
        "Valley",
        "Winter",
        "Yacht",
        "Zebra",
        "Bridge",
        "Cloud",
        "Desert",
        "Echo",
        "Future",
    ),
)
VERBS = ("Save", "Follow", "Remember", "Protect", "Visit", "Explore", "Share", "Watch", "Build", "Trust", "Paint", "Welcome")
PLACES = ("Room", "Gate", "Platform", "Route", "Exit", "Floor", "Studio", "Bus", "Flight", "Chapter")


class WritingGrammar(Grammar):
    """Signs, posters, mugs and the like with a text in double quotes, which stands in the metadata as "text" too.

    Texts are a word, two words, a sentence, or a word with a number: the tag says which.
    """

    mix: ClassVar[Mapping[str, int]] = {"word": 1, "words": 1, "sentence": 1, "number": 1}

    def draw(self, kind: str, chance: random.Random) -> Prompt:
        text = _text(kind, chance)
        words = chance.choice(CARRIERS).format(text=f'"{text}"') + chance.choice(SCENES)
        return Prompt(words, {"text": text, "tag": kind})

    def content(self, prompt: Prompt) -> str:
        return str(prompt.metadata["text"]).casefold()


def _text(kind: str, chance: random.Random) -> str:
    adjective, noun, verb = chance.choice(ADJECTIVES), chance.choice(NOUNS), chance.choice(VERBS)
    if kind == "word":
        text = chance.choice((adjective, noun, verb))
    elif kind == "words":
        text = f"{adjective} {noun}"
    elif kind == "number":
        text = f"{chance.choice(PLACES)} {chance.randrange(2, 100)}"
    else:
        text = f"{verb} the {adjective.lower()} {noun.lower()}"
    return chance.choice((text, text, text.upper()))
