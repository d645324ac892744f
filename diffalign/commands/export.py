"""Write the trained weights for use elsewhere: diffusers, ComfyUI, or a whole pipeline."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="a run folder (its last checkpoint), or a checkpoint such as RUN/step-000100 or RUN/best"
    )
    parser.add_argument(
        "--format",
        choices=("diffusers", "comfyui", "merged"),
        help="LoRA for diffusers' load_lora_weights, LoRA for ComfyUI, or the whole pipeline with the LoRA merged in (diffusers if the "
        "policy has adapters, else merged)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="output folder, new or empty (RUN/export/FORMAT, which is written anew)")
    parser.add_argument("--role", metavar="NAME", help="weights of the checkpoint to export (the average if there is one, else the policy)")


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    from ..core import ConfigError
    from ..core.unessential import unessential
    from ..export import Card, export
    from ..export.formats import usual_form
    from ..runs.folder import require_writable
    from ..runs.snapshot import read_manifest
    from ..runs.trained import evaluated_role, trained_policy
    from .subject import Subject

    subject = Subject.of(options.run, overrides)
    if subject.checkpoint is None or subject.folder is None:
        raise ConfigError(f"export needs a run folder or a checkpoint; {options.run!r} is a run file, whose weights are not trained yet")
    if options.out is not None and options.out.is_dir() and any(options.out.iterdir()):
        raise ConfigError(
            f"--out must be a new or an empty folder; {options.out} holds files, perhaps of another export. Name another one."
        )
    require_writable(options.out or subject.folder / "export", "--out")
    policy = trained_policy(subject.job, subject.checkpoint, options.role)
    card = Card()
    with unessential("what the model card says of the run"):
        manifest = read_manifest(subject.checkpoint)
        evaluated = evaluated_role(manifest)
        role = options.role or evaluated or ""
        card = Card.of_run(subject.folder, int(manifest["step"]), role)
        card = card if role == evaluated else card.unmeasured()
    form = options.format or usual_form(policy)
    try:
        print(export(policy, options.out or subject.folder / "export" / form, form, card))
    except ValueError as error:
        raise ConfigError(f"{f'--format {form}' if options.format else options.run}: {error}") from error
    return 0
