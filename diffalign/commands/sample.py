"""Draw images; a run folder is sampled with its last checkpoint."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import positive, run_argument

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..core import Policy


def configure(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--prompt", nargs="+", action="extend", required=True, metavar="TEXT", help="prompts; each gives a row of images")
    parser.add_argument("--n", type=positive, default=4, help="images per prompt (%(default)s)")
    parser.add_argument("--steps", type=positive, help="denoising steps (those of a few-step student, else 28)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    parser.add_argument("--size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help="image size in pixels (the run's own)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from ..prompts import require_readable
    from ..runs.folder import require_writable
    from ..runs.trained import trained_policy
    from ..threads import take_fair_threads
    from .subject import Subject

    _require_picture(options.out)
    require_writable(options.out.parent, "--out")
    for text in options.prompt:
        require_readable(text, "--prompt")
    subject = Subject.of(options.run, overrides)
    policy = trained_policy(subject.job, subject.checkpoint)
    take_fair_threads(policy.device)
    sheet = _drawn(policy, options, int(subject.job.tree["chunk"]))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out)
    print(options.out)
    return 0


def _require_picture(file: Path) -> None:
    """Refuse a name in whose format no picture can be saved: Pillow knows some that it only reads."""
    from PIL import Image

    from ..core import ConfigError

    try:
        Image.new("RGB", (64, 64)).save(io.BytesIO(), Image.registered_extensions()[file.suffix.lower()])
    except (KeyError, OSError, ValueError) as error:
        raise ConfigError(f"--out must end in an image format such as .png; got {str(file)!r}") from error


def _drawn(policy: "Policy", options: argparse.Namespace, rows: int) -> "Image":
    import torch

    from ..core import ConfigError, Progress, Prompt, Streams
    from ..evaluation.evaluate import usual_steps
    from ..evaluation.pictures import contact_sheet
    from ..samplers import DeterministicSampler

    size = {} if options.size is None else dict(zip(("height", "width"), options.size, strict=True))
    prompts = [Prompt(text, size) for text in options.prompt]
    steps = options.steps or usual_steps(policy)
    sampler = DeterministicSampler(steps, options.n, rows=rows)
    for option, require in (("--size", lambda: policy.sized(prompts[0].size)), ("--prompt", lambda: policy.require(prompts))):
        try:
            require()
        except ValueError as error:
            raise ConfigError(f"{option}: {error}") from error
    with torch.no_grad():
        latents = sampler.sample(policy, policy.encode(prompts), Progress(0, 1), Streams(options.seed)).samples
        images = torch.cat([policy.decode(piece).cpu() for piece in latents.split(rows)])
    return contact_sheet(images.view(len(prompts), options.n, *images.shape[1:]), options.prompt)
