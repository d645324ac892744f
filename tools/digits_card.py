"""Measures the flow and the judge of diffalign.digits and writes their model card: `python tools/digits_card.py FOLDER`."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch
from torch import Tensor

from diffalign.core import Guided, Policy, Progress, Prompt, Streams
from diffalign.digits import DigitReward, DigitsPolicy, class_shares, distance_to_real, effective_classes, probabilities, split
from diffalign.digits.grammar import FAMILIES, NAMES, wishes
from diffalign.evaluation import contact_sheet
from diffalign.samplers import DeterministicSampler

PLAIN = "a digit"
SHOWN = (PLAIN, "an even digit", "a digit above five", "a seven", "a thin four", "a thick eight")


@attrs.frozen
class Setting:
    """Sampling setting: number of deterministic steps, and guidance scale (1 means no guidance)."""

    steps: int
    guidance: float = 1.0

    def __str__(self) -> str:
        return f"{self.steps} steps" + ("" if self.guidance == 1 else f", guidance {self.guidance:g}")


SETTINGS = (Setting(8), Setting(20), Setting(50), Setting(20, 3.0))


@torch.no_grad()
def drawn(policy: Policy, prompt: str, steps: int, samples: int, seed: int = 0) -> Tensor:
    """Draw images [samples, 3, 64, 64] of one prompt."""
    forest = DeterministicSampler(steps, samples).sample(policy, policy.encode([Prompt(prompt)]), Progress(0, 1), Streams(seed))
    return policy.decode(forest.samples)


def measure(base: Policy, setting: Setting, samples: int) -> dict[str, Any]:
    """Measure the share of right images of every prompt; for "a digit" also the classes and the distance to real images."""
    policy = base if setting.guidance == 1 else Guided(base, setting.guidance)
    captions = [wish.caption for family in FAMILIES for wish in wishes(family)]
    reward, right = DigitReward(), {}
    for caption in captions:
        right[caption] = float(reward(drawn(policy, caption, setting.steps, samples), [Prompt(caption)] * samples).mean())
    images = drawn(policy, PLAIN, setting.steps, 8 * samples, seed=1)
    shares = class_shares(images)
    return {
        "right": right,
        "shares": shares.tolist(),
        "effective_classes": effective_classes(shares),
        "distance": distance_to_real(images),
    }


def kinds(right: Mapping[str, float]) -> dict[str, float]:
    """Average over the prompts of each kind: family, with or without a stroke."""
    found: dict[str, list[float]] = {}
    for family in FAMILIES:
        for wish in wishes(family):
            found.setdefault(f"{family}, {'thin or thick' if wish.thickness else 'any stroke'}", []).append(right[wish.caption])
    return {kind: sum(values) / len(values) for kind, values in found.items()}


def judged() -> dict[str, float]:
    """Measure the judge on the held-out images, and their distance to the training images."""
    _, held_out = split()
    seen = probabilities(held_out.images)
    sure = seen.amax(1) > 0.8
    return {
        "accuracy": float((seen.argmax(1) == held_out.labels).float().mean()),
        "sure": float(sure.float().mean()),
        "right_where_sure": float((seen.argmax(1) == held_out.labels)[sure].float().mean()),
        "distance": distance_to_real(held_out.images),
    }


def tables(results: Mapping[str, Mapping[str, Any]], real: Mapping[str, float], samples: int) -> str:
    """Write Markdown tables: shares of right images by kind of prompt, and the measures of "a digit"."""
    names = list(kinds(next(iter(results.values()))["right"]))
    lines = ["| sampling | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for name, result in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in kinds(result["right"]).values()) + " |")
    picked = ("an even digit", "an odd digit", "a digit above five", "a digit below five", *SHOWN[3:])
    lines += ["", "Single prompts:", "", "| sampling | " + " | ".join(picked) + " |", "|---" * (len(picked) + 1) + "|"]
    for name, result in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{result['right'][prompt]:.3f}" for prompt in picked) + " |")
    head = " | ".join(NAMES)
    lines += ["", f'The prompt "{PLAIN}", {8 * samples} pictures: share of each digit, effective classes, distance to real pictures:', ""]
    lines += [f"| sampling | {head} | none | effective | distance |", "|---" * 14 + "|"]
    for name, result in results.items():
        shares = " | ".join(f"{share:.3f}" for share in [*result["shares"], 1 - sum(result["shares"])])
        lines.append(f"| {name} | {shares} | {result['effective_classes']:.2f} | {result['distance']:.3f} |")
    lines.append(f"| held-out real pictures |{' |' * 12} {real['distance']:.3f} |")
    return "\n".join(lines)


def card(history: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], real: Mapping[str, float], samples: int) -> str:
    """Write the text of the model card."""
    return f"""---
license: apache-2.0
datasets: optical-recognition-of-handwritten-digits
pipeline_tag: text-to-image
---
# Digits

A flow of 1.3 million numbers for handwritten digits of 8 x 8 pixels that reads prompts, and a judge of 0.15 million that reads digits:

```python
from diffalign.digits import DigitsPolicy

policy = DigitsPolicy.from_pretrained("digits")
```

Prompts: "a digit", "an even digit", "an odd digit", "a digit above five", "a digit below five", and "a zero" to "a nine", each also thin or
thick ("a thin seven"). The flow follows them only in part, on purpose: {history["flow"]["captions_of_another_picture"]:.0%} of the captions
that it was trained on belonged to another picture, so there is something for alignment to do.

`velocity.safetensors` holds the flow and `judge.safetensors` the judge, both in half precision (they compute in single precision).

## Data and licence

Trained on 1,437 of the 1,797 pictures in `diffalign/digits/data`: *Optical Recognition of Handwritten Digits*, E. Alpaydin and C. Kaynak,
UCI Machine Learning Repository, CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/). The weights are Apache-2.0.

## Training

`python tools/digits_pretrain.py diffalign/digits/model` makes these files from the pictures alone, and this card (`tools/digits_card.py`).
The flow is the average of the weights of its run; {history["flow"]["empty_captions"]:.0%} of the captions were empty, for guidance. The
judge learned to be unsure of noise, mixtures and shuffled pictures, so that it is hard to fool.

```json
{json.dumps(dict(history), indent=1)}
```

## Judge

On the 360 pictures held out of both trainings: accuracy {real["accuracy"]:.3f}; sure of a digit (probability above 0.8) in
{real["sure"]:.3f} of them, and right in {real["right_where_sure"]:.3f} of those.

## Accuracy

Share of right pictures (`DigitReward`: the judge is sure, the digit is one of those asked for, and the stroke as thick), {samples} pictures
a prompt, deterministic steps, shift 1.

{tables(results, real, samples)}

"none": the judge is sure of no digit. Distance: mean Euclidean distance to the nearest of the 1,437 pictures, in [-1, 1]^64.
"""


def write(folder: Path, samples: int = 256) -> None:
    """Measure the flow in the folder, and write README.md, measured.json and samples.png there. The judge is that of the package."""
    policy = DigitsPolicy.from_pretrained(str(folder), device="cpu", trainable=False)
    results = {str(setting): measure(policy, setting, samples) for setting in SETTINGS}
    real = judged()
    history = json.loads((folder / "training.json").read_text())
    (folder / "README.md").write_text(card(history, results, real, samples))
    (folder / "measured.json").write_text(json.dumps({"samples": samples, "judge": real, "settings": results}, indent=1) + "\n")
    pictures = torch.stack([drawn(policy, caption, 20, 12, seed=2) for caption in SHOWN])
    contact_sheet(pictures, SHOWN).save(folder / "samples.png")
    print(tables(results, real, samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=256, help="pictures a prompt")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write(arguments.folder, arguments.samples)


if __name__ == "__main__":
    main()
