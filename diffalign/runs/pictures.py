"""Pictures of the first and the last step, so that a run without evaluation can be looked at, too."""

from pathlib import Path

import attrs
from PIL import Image

from ..core import AlignmentLoop, Hook, Prompt
from ..core.unessential import unessential
from ..evaluation import contact_sheet, evaluate
from ..evaluation.evaluate import usual_steps
from ..evaluation.report import DRAWN


@attrs.define(eq=False)
class FirstAndLast(Hook):
    """Draws some of the run's prompts before the first step and after the last, from the same noise: `images/drawn-NNNNNN.png`.

    They are drawn by the weights that evaluation takes, with as many denoising steps as the sampler has. The report sets both side by side.
    Where an evaluation that stands before this hook keeps pictures of its own, nothing is drawn.

    Args:
        folder: folder of the run
        prompts: number of prompts
        samples: number of images of each prompt
        seed: seed of the noise
    """

    folder: Path
    prompts: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    samples: int = attrs.field(default=4, validator=attrs.validators.ge(1))
    seed: int = 0

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        if step == 0 or not [*self.folder.glob(f"images/{DRAWN}-*.png")]:
            self._draw(loop, step)

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        if error is None and step:
            self._draw(loop, step)

    def _draw(self, loop: AlignmentLoop, step: int) -> None:
        if any(len(result.images) for result in loop.evaluations):
            return
        sheet = drawn(loop, step, self.prompts, self.samples, self.seed)
        if loop.devices.rank == 0:
            file = self.folder / "images" / f"{DRAWN}-{step:06d}.png"
            with unessential(str(file)):
                file.parent.mkdir(parents=True, exist_ok=True)
                sheet.save(file)


def drawn(loop: AlignmentLoop, step: int, prompts: int, samples: int, seed: int) -> Image.Image:
    """Draw the first distinct prompts of a run's first step with the present weights, always from the same noise.

    Args:
        loop: the run
        step: steps done, for the record
        prompts: number of prompts
        samples: number of images of each prompt
        seed: seed of the noise
    """
    policy = loop.evaluation_policy()
    chosen = list(dict.fromkeys(map(Prompt.of, loop.prompts.draw(0, max(prompts, loop.prompts_per_step)))))[:prompts]
    outline = loop.sampler.outline(policy)
    steps = usual_steps(policy) if policy.step_counts or outline is None else outline.stages
    with loop.ledger.stage("pictures"):
        result = evaluate(
            policy,
            chosen,
            {},
            features={},
            samples=samples,
            steps=steps,
            seed=seed,
            step=step,
            rows=loop.chunk,
            pictures=len(chosen),
            devices=loop.devices,
            lockstep=loop.lockstep,
        )
    return contact_sheet(result.images, [str(prompt) for prompt in chosen])
