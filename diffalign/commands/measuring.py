"""Arguments that `evaluate` and `compare` share: runs and checkpoints, and how they are measured."""

import argparse

from .options import positive

SUBJECT = "a run folder (its last checkpoint), a checkpoint such as RUN/step-000100 or RUN/best, or a run file (untrained weights)"


def measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Add arguments for sampling and measuring. An argument that is not given is taken from the evaluation of the (first) run."""
    parser.add_argument("--prompts", metavar="FILE", help="a prompt file, or a shipped list such as shapeworld/count-held-out")
    parser.add_argument("--samples", type=positive, metavar="N", help="images per prompt")
    parser.add_argument("--steps", type=positive, metavar="N", help="denoising steps; by default those of a few-step student, else 28")
    parser.add_argument("--seed", type=int, metavar="N", help="of the noise")
    parser.add_argument("--rows", type=positive, default=128, metavar="N", help="network rows per call, images per round (%(default)s)")
    parser.add_argument("--pictures", type=positive, default=6, metavar="N", help="number of prompts whose images are kept (%(default)s)")
    part = "[NAME=]PART"
    parser.add_argument(
        "--reward", action="append", default=[], metavar=part, help="a further reward, by name, import path or YAML; repeat for more"
    )
    parser.add_argument(
        "--features", action="append", default=[], metavar=part, help="features to measure diversity on, such as ShapeWorldFeatures"
    )
