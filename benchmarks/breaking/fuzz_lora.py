"""One broken file of adapters by its number: a run starts at exactly what it means, or one message of ours refuses it."""

import random
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError

from .fault import FaultError
from .lora_changes import CHANGES, break_bytes
from .lora_files import LoraFile, written_by_somebody
from .lora_truth import Plain, World, alphas_differ, multiplied_in, rewritten, same, unspread, world

FAMILIES = ("sd3", "flux-dev", "flux2-klein", "z-image", "qwen-image", "sana", "sd15", "sdxl")
LINES, LETTERS = 20, 1500
"""A message is no longer."""


def made(number: int) -> tuple[World, LoraFile, list[str]]:
    """The file of a number before it is written, its family, and what was changed in it; every seventh is as its writer made it."""
    chance = random.Random(f"lora {number}")
    torch.manual_seed(number)
    here = world(chance.choice(FAMILIES))
    file = written_by_somebody(here.denoiser, chance)
    changes = chance.choices(CHANGES, k=chance.choice((1, 1, 2))) if number % 7 else []
    for change in changes:
        if file.tensors:
            change(file, chance)
    return here, file, [change.__name__ for change in changes]


def case(number: int, folder: Path) -> str:
    """Try one file.

    Returns:
        What came of it.

    Raises:
        FaultError: neither the weights of plain diffusers nor one message of ours.
    """
    shutil.rmtree(folder, ignore_errors=True)
    here, file, changes = made(number)
    about = f"lora {number}, {here.name}, {file.writer}, {changes}"
    place = file.write(folder)
    chance = random.Random(f"bytes {number}")
    if number % 7 == 6:
        about += f", {break_bytes(place, chance)}"
    try:
        mine = here.started(place)
    except ValueError as error:
        return _refused(str(error), file, changes, about, number)
    except Exception as error:
        raise FaultError(f"{about}: {type(error).__name__}: {error}") from error
    if file.mark and not changes and number % 7 != 6:
        raise FaultError(f"{about}: was read, although it has {file.mark}")
    theirs = here.plain(place)
    if theirs.texts:
        raise FaultError(f"{about}: was read, although it changes a text encoder")
    if same(mine, theirs.changes):
        return "as plain diffusers"
    return _explained(here, file, place, mine, theirs, about)


def _refused(message: str, file: LoraFile, changes: list[str], about: str, number: int) -> str:
    if not message.startswith("LoRA.") or len(message.splitlines()) > LINES or len(message) > LETTERS:
        raise FaultError(f"{about}: is refused by {len(message)} letters: {message[:600]}")
    if not changes and not file.mark and number % 7 != 6:
        raise FaultError(f"{about}: a good file is refused: {message}")
    return "refused"


def _explained(here: World, file: LoraFile, place: Path, mine: dict[str, torch.Tensor], theirs: Plain, about: str) -> str:
    """Why plain diffusers has other weights, if the file means what a run starts at."""
    try:
        other = unspread(place, place.parent / "unspread")
    except SafetensorError as error:
        raise FaultError(f"{about}: was read, although safetensors cannot: {error}") from error
    if same(mine, here.plain(other).changes):
        return "as plain diffusers of the file in float32, without prefixes of DDP and zeros beside the pairs"
    plainly = rewritten(file, place, here.denoiser)
    if plainly is None:
        if theirs.refused and same(mine, here.plain(multiplied_in(other, place.parent / "multiplied")).changes):
            return "as plain diffusers of the file with alphas multiplied in; it refuses this one"
        raise FaultError(
            f"{about}: differs from plain diffusers ({theirs.refused or sorted(theirs.changes)}), and no rule says what it means"
        )
    meant = here.plain(plainly.write(place.parent / "plainly"))
    if not same(mine, meant.changes):
        raise FaultError(
            f"{about}: differs from plain diffusers ({theirs.refused}), also of the file as diffusers writes it ({meant.refused})"
        )
    if theirs.refused:
        return "as plain diffusers of the renamed file; it refuses this one"
    if not theirs.changes:
        return "as plain diffusers of the renamed file; it reads nothing of this one"
    if same(mine, theirs.changes, theirs.changes):
        return "as plain diffusers of the renamed file; it reads a part of this one"
    if file.beside is not None:
        return "as plain diffusers of the renamed file; of this one it does not read the settings beside it"
    if here.denoiser.component == "unet" and alphas_differ(place):
        return "as plain diffusers of the renamed file; of this one it takes one alpha for all layers"
    raise FaultError(f"{about}: plain diffusers reads it otherwise")
