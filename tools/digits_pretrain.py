"""Trains the flow and the judge of diffalign.digits on the images that ship with it, and writes their model card.

`python tools/digits_pretrain.py FOLDER [--only judge]`: ten minutes on one core. The embedded ones are in diffalign/digits/model.
"""

import argparse
import copy
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import digits_card
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from diffalign.digits.grammar import NOUNS, STROKES
from diffalign.digits.handwriting import LEVELS, Handwriting, split
from diffalign.digits.networks import JudgeNetwork, VelocityNetwork
from diffalign.digits.policy import DigitsPolicy
from diffalign.digits.thickness import is_of, relative_ink

OTHER = 0.4
"""Share of captions that belong to another image, so that the base leaves something to align."""

EMPTY = 0.1
"""Share of empty captions, for guidance."""

STROKE = 0.5
"""Share of the captions of thin and thick images that name the thickness."""

GRAIN = 0.05
"""Standard deviation of the noise on the pixels. The images have only 17 grey levels, but a flow needs a continuous density."""


DOUBT = 0.1
"""Weight of the images that show no digit, of which the judge must be unsure."""


SETS_OF = (("even digit", "odd digit"), ("digit above five", "digit below five"))


def said_of(digit: int, generator: random.Random) -> tuple[int, ...] | None:
    """Draw the noun of a digit's caption: any (1/4), its name (7/20), or one of its two sets (1/5 each); a five has only one set.

    The probability of a noun must not depend on the digit, or the prompt "a digit" would prefer the five. So the rest is None.
    """
    draw = generator.random()
    if draw < 0.25:
        return NOUNS["digit"]
    if draw < 0.6:
        return (digit,)
    pair = SETS_OF[draw < 0.8]
    return next((NOUNS[noun] for noun in pair if digit in NOUNS[noun]), None)


def captions(pictures: Handwriting, generator: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield captions of all images without end, drawn anew every time: conditions [N, 12], and [N] with 0 for no caption."""
    relative = relative_ink(pictures.pixels.float() / LEVELS, pictures.labels)
    strokes = torch.stack([is_of(stroke, relative) for stroke in STROKES], dim=1).tolist()
    labels = pictures.labels.tolist()
    while True:
        rows, there = torch.zeros(len(labels), 12), torch.ones(len(labels))
        for row in range(len(labels)):
            if generator.random() < EMPTY:
                continue
            place = generator.randrange(len(labels)) if generator.random() < OTHER else row
            classes = said_of(labels[place], generator)
            if classes is None:
                there[row] = 0
                continue
            rows[row, list(classes)] = 1
            for column, stroke in enumerate(strokes[place]):
                if stroke and generator.random() < STROKE:
                    rows[row, 10 + column] = 1
        yield rows, there


def train_flow(steps: int, batch: int, seed: int, rate: float = 1e-3, decay: float = 0.998) -> tuple[VelocityNetwork, float]:
    """Train the flow. Returns the average of the weights, and the last velocity loss (mean of 200 steps)."""
    torch.manual_seed(seed)
    pictures, _ = split()
    network = VelocityNetwork()
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    told, latents = captions(pictures, random.Random(f"captions {seed}")), pictures.latents
    (conditions, there), losses, start = next(told), [], time.monotonic()
    for step in range(steps):
        if step % 8 == 0:
            conditions, there = next(told)
        index = torch.randint(len(pictures), (batch,))
        clean = latents[index] + GRAIN * torch.randn(batch, 1, 8, 8)
        noise = torch.randn(batch, 1, 8, 8)
        sigma = torch.sigmoid(0.7 + 1.2 * torch.randn(batch))  # most near the noise, where the prompt decides
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        said = conditions[index]
        errors = (network(noisy, sigma, said[:, :10], said[:, 10:]) - (noise - clean)).square().flatten(1).mean(dim=1)
        loss = (errors * there[index]).sum() / there[index].sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            weight = 1 - min(decay, (1 + step) / (10 + step))
            for mine, its in zip(average.parameters(), network.parameters(), strict=True):
                mine.lerp_(its, weight)
        if step % 1000 == 999:
            print(f"flow {step + 1}: loss {sum(losses[-200:]) / 200:.4f}, {time.monotonic() - start:.0f} s", flush=True)
    return average, sum(losses[-200:]) / 200


def altered(pictures: Tensor) -> Tensor:
    """Change images [B, 1, 8, 8]: moved by up to half a pixel, turned by up to 6 degrees, stretched, paler or darker, and noisy."""
    count = len(pictures)
    angle, zoom = (torch.rand(count) - 0.5) * 0.2, 1 + (torch.rand(count) - 0.5) * 0.1
    move = (torch.rand(count, 2) - 0.5) * 0.2
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = torch.stack([torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)], 1)
    grid = F.affine_grid(rows, [count, 1, 8, 8], align_corners=False)
    ink = F.grid_sample((pictures + 1) / 2, grid, align_corners=False) * (0.8 + 0.3 * torch.rand(count, 1, 1, 1))
    noise = 0.12 * torch.rand(count, 1, 1, 1) * torch.randn_like(ink)
    return (ink + noise).clamp(0, 1) * 2 - 1


def no_digits(pictures: Tensor) -> Tensor:
    """Make images [B, 1, 8, 8] that show no digit: noise, mixtures of two, exchanged halves, shuffled pixels, dots."""
    count = len(pictures)
    other = pictures[torch.randperm(count)]
    share = 0.4 + 0.2 * torch.rand(count, 1, 1, 1)
    mixed = share * pictures + (1 - share) * other
    halves = torch.cat([pictures[:, :, :, 4:], other[:, :, :, :4]], dim=3)
    shuffled = pictures.flatten(1)[:, torch.randperm(64)].view_as(pictures)
    noise = torch.rand_like(pictures) * 2 - 1
    sparse = (torch.rand_like(pictures) < torch.rand(count, 1, 1, 1)).float() * 2 - 1
    kinds = torch.stack([mixed, halves, shuffled, noise, sparse])
    return kinds[torch.randint(len(kinds), (count,)), torch.arange(count)]


def train_judge(steps: int, batch: int, seed: int) -> tuple[JudgeNetwork, float]:
    """Train a classifier that is unsure of images without a digit. Returns it with its accuracy on the held-out images."""
    torch.manual_seed(seed)
    pictures, held_out = split()
    network = JudgeNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        index = torch.randint(len(pictures), (batch,))
        clean = pictures.latents[index]
        logits, unsure = network(altered(clean)), network(no_digits(clean)[: batch // 4])
        loss = F.cross_entropy(logits, pictures.labels[index]) - DOUBT * unsure.log_softmax(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval()
    return network, float((network(held_out.latents).argmax(1) == held_out.labels).float().mean())


def halved(network: nn.Module) -> dict[str, Tensor]:
    """Tensors of a network in half precision."""
    return {name: tensor.detach().half().contiguous() for name, tensor in network.state_dict().items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=("judge", "flow"))
    parser.add_argument("--steps", type=int, default=6000, help="of the flow")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--judge-steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "training.json"
    history = json.loads(record.read_text()) if record.exists() else {}
    if arguments.only != "flow":
        judge, accuracy = train_judge(arguments.judge_steps, 256, arguments.seed)
        save_file(halved(judge), folder / "judge.safetensors")
        history["judge"] = {"steps": arguments.judge_steps, "batch": 256, "seed": arguments.seed, "held_out_accuracy": round(accuracy, 4)}
        print("judge: held-out accuracy", accuracy, flush=True)
    if arguments.only != "judge":
        network, loss = train_flow(arguments.steps, arguments.batch, arguments.seed)
        DigitsPolicy(network).save(str(folder), "float16")
        history["flow"] = {
            "steps": arguments.steps,
            "batch": arguments.batch,
            "seed": arguments.seed,
            "captions_of_another_picture": OTHER,
            "empty_captions": EMPTY,
            "velocity_loss": round(loss, 4),
        }
    record.write_text(json.dumps(history, indent=1) + "\n")
    digits_card.write(folder)


if __name__ == "__main__":
    main()
