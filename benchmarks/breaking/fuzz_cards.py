"""One README of a base by its number: a model card can always be written, with the licence that the hub sees or with none."""

import contextlib
import functools
import io
import random
import re
from pathlib import Path
from typing import Any

import yaml

from diffalign.export.card import Card, base_licence
from diffalign.policies import FlowMatchingPolicy

from .fault import FaultError

FRONTS = (
    *(
        "license: mit",
        "license: other\nlicense_name: flux-1-dev",
        "license: [mit, apache-2.0]",
        "license:\n- mit\n- cc-by-4.0",
        "tags: [a, b]",
    ),
    *(
        "license: null",
        "license: 3",
        "license: 2024-01-01",
        "license: {a: b}",
        "license: 'mit | x'",
        "title: Foo: a bar\nlicense: mit",
        "- mit",
    ),
    *(
        "license: &a mit\nlicense_name: *a",
        "license: yes",
        "license: !!python/object:os.system x",
        "license: |\n  mit\n  more",
        "license: ''",
    ),
    *(
        "license: 2024-13-45",
        "license: ünï",
        "License: mit",
        "license: mit\nlicense: apache-2.0",
        "{license: mit}",
        "\tlicense: mit",
        "license : mit",
    ),
)
BODIES = (
    "# X\n",
    "# X\n\n---\n\n**Use it** *with* 28 steps.\n",
    "---\n| a | b |\n|---|---|\n",
    "Modèle\n",
    "---\n\tx: y\n",
    "",
    "---\n---\n---\n",
)


def written(number: int) -> bytes:
    chance = random.Random(f"card {number}")
    front, body = chance.choice(FRONTS), chance.choice(BODIES)
    text = chance.choice(
        (f"---\n{front}\n---\n{body}", f"---\n{front}\n---\n{body}", body, f"\n---\n{front}\n---\n{body}", f"---\n{front}\n")
    )
    text = text.replace("\n", chance.choice(("\n", "\n", "\r\n")))
    content = text.encode(chance.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-16-le")), errors="replace")
    for _ in range(chance.choice((0, 0, 1, 3))):
        at = chance.randrange(len(content) + 1)
        odd = (b"", b"---\n", b":", b"\0", b"\xff", b"[", b"{", b"&a", b"*a", b"!", b"\t", b"\n", b"|", b'"', b"%", b"[" * 3000, b"? ")
        content = content[:at] + chance.choice(odd) + content[at + chance.randint(0, 2) :]
    return content


def of_the_hub(content: bytes) -> Any:
    """The licence that the hub's own reader finds; None if it finds none or refuses the card."""
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()
    try:
        text = re.sub(r"(?m)^---[ \t]+(?=\r?$)", "---", content.decode("utf-8-sig", errors="replace"))  # a rule may end with blanks
        data = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # no front matter that it can read
        return None
    return data.get("license_name") or data.get("license")


@functools.cache
def _policy() -> FlowMatchingPolicy:
    return FlowMatchingPolicy.from_pretrained("shapeworld", device="cpu")


def case(number: int, folder: Path) -> str:
    """Try one README.

    Returns:
        What came of it.

    Raises:
        FaultError: an error, a card that cannot be read back, or a licence that the hub does not see.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = written(number)
    (folder / "README.md").write_bytes(content)
    policy = _policy()
    policy.family.folder, policy.family.source = folder, "someone/base"
    about = f"card {number}, {content[:200]!r}"
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            licence = base_licence(policy)
            card = Card("SoftmaxTB").text(policy, "diffusers")
    except Exception as error:
        raise FaultError(f"{about}: {type(error).__name__}: {error}") from error
    front = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    if "\n" in licence or front.get("license", "") != licence or front["base_model"] != "someone/base":
        raise FaultError(f"{about}: the card says {front}, and the licence is {licence!r}")
    seen = of_the_hub(content)
    words = seen if isinstance(seen, list) else [] if seen is None else [seen]
    if licence and licence != ", ".join(" ".join(str(word).replace("|", "/").split()) for word in words):
        raise FaultError(f"{about}: the licence is {licence!r}, and the hub sees {seen!r}")
    return "the hub's licence" if licence else "none, although the hub sees one" if seen else "none"
