"""Measures a ShapeWorld pipeline and writes its model card: `python tools/shapeworld_card.py FOLDER`."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from diffalign.core import Guided, Policy, Prompt
from diffalign.evaluation import Evaluation, contact_sheet, evaluate
from diffalign.policies import FlowMatchingPolicy
from diffalign.shapeworld.grammar import FAMILIES, prompt_split
from diffalign.shapeworld.networks import MAX_SEQUENCE_LENGTH
from diffalign.shapeworld.scorers import CompositionalReward, ExactMatch


@attrs.frozen
class Setting:
    """Sampling setting: steps, guidance scale (1 means no guidance), text tokens (None means diffusers' default of 256)."""

    steps: int
    guidance: float = 1.0
    length: int | None = MAX_SEQUENCE_LENGTH

    def __str__(self) -> str:
        guidance = "no guidance" if self.guidance == 1 else f"guidance {self.guidance:g}"
        return f"{self.steps} steps, {guidance}, max_sequence_length {self.length or 256}"


SETTINGS = (Setting(28), Setting(28, guidance=3.0), Setting(8), Setting(28, length=None))


def measure(folder: Path, setting: Setting, prompts: int, samples: int, seed: int) -> dict[str, Evaluation]:
    """Measure reward and exact accuracy by family, on held-out prompts."""
    policy: Policy = FlowMatchingPolicy.from_pretrained(str(folder), max_sequence_length=setting.length).fork()
    if setting.guidance != 1:
        policy = Guided(policy, setting.guidance)
    rewards = {"reward": CompositionalReward(), "exact": ExactMatch()}
    return {
        family: evaluate(
            policy,
            [Prompt(caption) for caption in prompt_split(family)[1][:prompts]],
            rewards,
            samples=samples,
            steps=setting.steps,
            seed=seed,
            pictures=2,
        )
        for family in FAMILIES
    }


def table(results: Mapping[str, Mapping[str, Evaluation]]) -> str:
    """Write a Markdown table: one row per setting, reward and exact accuracy by family, and the diversity of all samples."""
    head = "| sampling | " + " | ".join(f"{family} reward | {family} exact" for family in FAMILIES) + " | L-GMD |"
    lines = [head, "|---" * (2 * len(FAMILIES) + 2) + "|"]
    for name, families in results.items():
        cells = [f"{families[f].rewards['reward'].mean():.3f} | {families[f].rewards['exact'].mean():.3f}" for f in FAMILIES]
        spread = torch.cat([families[f].l_gmd for f in FAMILIES]).mean()
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {spread:.3f} |")
    return "\n".join(lines)


def card(settings: Mapping[str, Any], results: Mapping[str, Mapping[str, Evaluation]], prompts: int, samples: int) -> str:
    """Write the text of the model card."""
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# ShapeWorld

A text-to-image pipeline of 4 million parameters for 64x64 pictures of coloured shapes and letters, in the folder format of diffusers:

```python
from diffusers import StableDiffusion3Pipeline
pipeline = StableDiffusion3Pipeline.from_pretrained(FOLDER)
pipeline("three red circles", guidance_scale=1, max_sequence_length=16).images[0]
```

It is imperfect on purpose: it miscounts and misspells, and there is something for alignment to do. Prompts read like "three red circles",
"a red circle and a blue square", "a green triangle left of a yellow circle" and 'the text "K7" in blue'; counts go to six, texts are two
of the twelve characters ACEHKLNPTX47. Nothing outside this grammar was ever seen in training.

## Parts

Stable Diffusion 3 transformer (6 layers, 4 heads of 32, 64 image tokens; stored in float16), autoencoder 64x64x3 -> 16x16x8 (0.4 M
parameters), two CLIP text encoders (2 layers of width 64) with 16-token tokenizers in which each word is one token. The T5 slot holds an
encoder whose last norm is zero, so it answers exactly the zeros that Stable Diffusion 3 puts in the place of an absent T5: plain
`from_pretrained` insists on the component. `max_sequence_length=16` is what it was mostly trained with; one batch in fifty used diffusers'
default of 256, which works too and costs several times as much.

## Training

`python tools/shapeworld_pretrain.py FOLDER`, then `python tools/shapeworld_card.py FOLDER`. Images are rendered by
`diffalign.shapeworld.render`; four tenths of them text and three tenths counting in the last stage, all captions of the grammar (the
held-out lists are held out from alignment, not from this training). Flow matching on standardised latents, captions
dropped in one of ten. `history` is what was done to
these weights, stage by stage; the script by its defaults does it in one stage, and with `--init` it goes on from a folder.

```json
{json.dumps(dict(settings), indent=2)}
```

## Accuracy

{prompts} held-out prompts of each family, {samples} samples each. "reward" gives partial credit in [0, 1], "exact" is the share of
pictures that are right in everything.

{table(results)}

Licence: Apache-2.0. Everything that it was trained on was rendered by this repository.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=24, help="held-out prompts of each family")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    arguments = parser.parse_args()
    results = {
        str(setting): measure(arguments.folder, setting, arguments.prompts, arguments.samples, arguments.seed) for setting in SETTINGS
    }
    settings = json.loads((arguments.folder / "training.json").read_text())
    (arguments.folder / "README.md").write_text(card(settings, results, arguments.prompts, arguments.samples))
    print(table(results))
    first = next(iter(results.values()))
    images = torch.cat([first[family].images for family in FAMILIES])
    labels = [str(prompt) for family in FAMILIES for prompt in first[family].prompts[: len(first[family].images)]]
    contact_sheet(images, labels).save(arguments.folder / "samples.png")
    if arguments.json:
        numbers = {name: {family: result.summary() for family, result in families.items()} for name, families in results.items()}
        arguments.json.write_text(json.dumps(numbers, indent=1))


if __name__ == "__main__":
    main()
