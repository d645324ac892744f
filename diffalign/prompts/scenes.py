"""Prompts of all sorts, for rewards of people's preference."""

import random
from collections.abc import Mapping
from typing import ClassVar

from diffalign.core import Prompt

from .grammar import Grammar

SUBJECTS = {
    "people": (
        *("an old fisherman", "a young violinist", "a firefighter", "two children", "a street vendor", "a ballet dancer", "an astronaut"),
        *("a woman in a red coat", "a chess player", "a baker", "a knight in armor", "a group of hikers", "a man with a long beard"),
        *("a girl with freckles", "a carpenter", "a scientist in a white coat", "a grandmother", "a cyclist", "a nurse", "a drummer"),
    ),
    "animals": (
        *("a red fox", "a sleeping cat", "an owl", "a herd of horses", "a hummingbird", "a sea turtle", "a border collie", "an elephant"),
        *("a snow leopard", "three penguins", "a chameleon", "a jellyfish", "a raven", "a hedgehog", "a tiger", "a swarm of butterflies"),
        *("a polar bear", "an octopus", "a deer", "a goldfish"),
    ),
    "things": (
        *("a vintage camera", "a steaming cup of tea", "a grand piano", "a wooden sailing ship", "a bowl of ramen", "a pocket watch"),
        *("a glass chess set", "an old typewriter", "a hot air balloon", "a stack of books", "a steam locomotive", "a pair of worn boots"),
        *("a lighthouse", "a crystal vase", "a motorcycle", "a treehouse", "a paper lantern", "a robot", "a chocolate cake", "a bicycle"),
    ),
    "places": (
        *("a mountain village", "a narrow alley", "a Japanese garden", "a space station", "an abandoned factory", "a lavender field"),
        *("a medieval castle", "an underwater city", "a desert with tall dunes", "a cozy living room", "a waterfall", "a night market"),
        *("a frozen lake", "a library with high shelves", "a volcano", "a bamboo forest", "a harbor", "a rooftop terrace", "a canyon"),
        "a greenhouse",
    ),
}
DOING = {
    "people": (
        *("reading a letter", "laughing", "walking through fog", "holding a lantern", "sitting by a window", "dancing", "looking up"),
        *("drinking coffee", "repairing a clock", "waiting for a train", "playing cards", "under an umbrella"),
    ),
    "animals": (
        *("looking into the camera", "crossing a river", "in tall grass", "on a tree stump", "among flowers", "in falling snow", "at rest"),
        *("jumping", "hiding behind leaves", "near a campfire", "beside a pond", "under a full moon"),
    ),
    "things": (
        *("on a wooden table", "on a beach", "in a dusty attic", "on a velvet cloth", "covered with moss", "in the rain", "by candlelight"),
        *("in a shop window", "on a marble floor", "in a meadow", "half buried in sand", "reflected in a puddle"),
    ),
    "places": (
        *("at dawn", "at night", "after a storm", "in winter", "in spring", "seen from above", "under the northern lights", "in heavy fog"),
        *("at noon", "in the golden hour", "full of people", "without a soul"),
    ),
}
STYLES = (
    *("a photo", "an oil painting", "a watercolor", "a pencil drawing", "a studio photograph", "a cinematic still", "a woodcut print"),
    *(
        "a digital illustration",
        "a 3D render",
        "a black and white photo",
        "an impressionist painting",
        "pixel art",
        "a stained glass window",
    ),
    *("a children's book illustration", "a macro photograph", "an ink sketch"),
)
QUALITIES = (
    *("", "", "", ", soft light", ", dramatic lighting", ", shallow depth of field", ", vivid colors", ", muted colors", ", high contrast"),
    *(", highly detailed", ", wide angle", ", minimalist", ", backlit", ", symmetrical composition"),
)
UNUSUAL = "unusual"
"""The tag of prompts that bring together what is seldom seen together."""


class SceneGrammar(Grammar):
    """People, animals, things and places in many styles, and pairs that are seldom seen together. The tag says which.

    Pairs of subject and circumstance are the content: those that are held out come in no style to train on.
    """

    mix: ClassVar[Mapping[str, int]] = dict.fromkeys((*SUBJECTS, UNUSUAL), 1)

    def draw(self, kind: str, chance: random.Random) -> Prompt:
        who, how = chance.sample(list(SUBJECTS), 2) if kind == UNUSUAL else (kind, kind)
        scene = f"{chance.choice(SUBJECTS[who])} {chance.choice(DOING[how])}"
        return Prompt(f"{chance.choice(STYLES)} of {scene}{chance.choice(QUALITIES)}", {"tag": kind, "scene": scene})

    def content(self, prompt: Prompt) -> str:
        return str(prompt.metadata["scene"])
