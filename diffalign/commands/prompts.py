"""Write a list of prompts with metadata, drawn by rule: composition, quoted texts, scenes, or GenEval's own."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .options import positive, refuse_overrides

_EPILOG = (
    "A run needs no file for these: PromptFile takes the path generated/NAME. What is held out is never in the list to train on, whatever "
    "the seed, and nothing that GenEval's 553 prompts ask for is in a list but their own."
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="composition, text or preference, each also with -held-out; or geneval")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl", help="where the list is written, a JSON object a line")
    parser.add_argument("--count", type=positive, metavar="N", help="how many (10000; held out 256, 256 and 200)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (%(default)s)")
    parser.epilog = _EPILOG


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from ..core import ConfigError
    from ..prompts import generated
    from ..runs.folder import require_writable

    refuse_overrides("prompts", "a name, a file, --count and --seed", overrides)
    if options.out.suffix != ".jsonl":
        raise ConfigError(f"OUT must end in .jsonl, because prompts have metadata; got {str(options.out)!r}")
    if options.out.exists():
        raise ConfigError(f"{options.out}: there is a file already. Remove it, or give another name.")
    require_writable(options.out.parent, "OUT")
    prompts = generated(options.name, options.count, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({**prompt.metadata, "prompt": str(prompt)}, ensure_ascii=False) for prompt in prompts)
    options.out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{options.out}: {len(prompts)} prompts")
    return 0
