"""Draw images; a run folder is sampled with its last checkpoint."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import positive, run_argument

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..core import AlignmentLoop


def configure(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--prompt", nargs="+", action="extend", required=True, metavar="TEXT", help="prompts; each gives a row of images")
    parser.add_argument("--n", type=positive, default=4, help="images per prompt (%(default)s)")
    parser.add_argument("--steps", type=positive, default=28, help="denoising steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (%(default)s)")
    parser.add_argument("--size", type=positive, nargs=2, metavar=("HEIGHT", "WIDTH"), help="image size in pixels (the run's own)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from PIL.Image import registered_extensions

    from .. import config
    from ..core import ConfigError
    from ..prompts import require_readable
    from ..threads import take_fair_threads

    if options.out.suffix.lower() not in registered_extensions():
        raise ConfigError(f"--out must end in an image format such as .png; got {str(options.out)!r}")
    for text in options.prompt:
        require_readable(text, "--prompt")
    job = config.parse(options.run, overrides)
    loop = job.build()
    take_fair_threads(loop.objective.policy.device)
    if Path(options.run).is_dir():
        from ..runs.checkpoints import Checkpoints

        Checkpoints(Path(options.run), job.tree["checkpoint_every"], job.yaml()).restore(loop)
    sheet = _drawn(loop, options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out)
    print(options.out)
    return 0


def _drawn(loop: "AlignmentLoop", options: argparse.Namespace) -> "Image":
    import torch

    from ..core import ConfigError, Progress, Prompt, Streams
    from ..evaluation.pictures import contact_sheet
    from ..samplers import DeterministicSampler

    size = {} if options.size is None else dict(zip(("height", "width"), options.size, strict=True))
    policy, prompts = loop.evaluation_policy(), [Prompt(text, size) for text in options.prompt]
    sampler = DeterministicSampler(options.steps, options.n, rows=loop.chunk)
    try:
        policy.sized(prompts[0].size)
    except ValueError as error:
        raise ConfigError(f"--size: {error}") from error
    with torch.no_grad():
        latents = sampler.sample(policy, policy.encode(prompts), Progress(0, 1), Streams(options.seed)).samples
        images = torch.cat([policy.decode(piece).cpu() for piece in latents.split(loop.chunk)])
    return contact_sheet(images.view(len(prompts), options.n, *images.shape[1:]), options.prompt)
