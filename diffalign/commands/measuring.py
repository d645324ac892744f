"""What `evaluate` and `compare` take: runs and checkpoints, and how they are measured."""

import argparse

from .options import positive

SUBJECT = "a run folder (its last checkpoint), a checkpoint such as RUN/step-000100 or RUN/best, or a run file (weights as they begin)"


def measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """How to sample and what to measure; what is left out is as in the evaluation of the (first) run."""
    parser.add_argument("--prompts", metavar="FILE", help="a prompt file, or a shipped list such as shapeworld/count-held-out")
    parser.add_argument("--samples", type=positive, metavar="N", help="images of a prompt")
    parser.add_argument("--steps", type=positive, metavar="N", help="denoising steps")
    parser.add_argument("--seed", type=int, metavar="N", help="of the noise")
    parser.add_argument("--rows", type=positive, default=128, metavar="N", help="network rows per call, images per round (%(default)s)")
    parser.add_argument("--pictures", type=positive, default=6, metavar="N", help="prompts that are drawn (%(default)s)")
    part = "[NAME=]PART"
    parser.add_argument(
        "--reward", action="append", default=[], metavar=part, help="a further reward, by name, import path or YAML; again for more"
    )
    parser.add_argument(
        "--features", action="append", default=[], metavar=part, help="what diversity is measured on, such as ShapeWorldFeatures"
    )
