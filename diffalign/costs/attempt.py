"""Small step of a run, which shows whether its parts work together. Nothing is written."""

from collections.abc import Mapping

from ..core import AlignmentLoop, Progress
from ..core.budget import limited
from ..core.report import is_even
from ..evaluation import HeldOutEvaluation, evaluate

PROMPTS = ROWS = SAMPLES = 2


def attempt(loop: AlignmentLoop, total: int, evaluation: HeldOutEvaluation | None = None) -> str:
    """Evaluate two held-out prompts, then do the first step of a run on two prompts, two network rows at a time.

    Weights and optimizers move by that step, so the loop is of no further use.

    Args:
        loop: the loop, before its first step
        total: steps of the run
        evaluation: evaluation of the run

    Returns:
        Result, as a line of a table.

    Raises:
        RewardError: a reward that cannot score; other errors as in the run.
    """
    if evaluation is not None:
        rewards = {**loop.named_rewards(), **evaluation.rewards}
        prompts, features = evaluation.held_out[:PROMPTS], evaluation.features
        evaluate(loop.evaluation_policy(), prompts, rewards, features=features, samples=SAMPLES, steps=evaluation.steps, rows=ROWS)
    loop.sampler, loop.chunk = limited(loop.sampler, ROWS), min(loop.chunk, 2 * ROWS)
    limited(loop.objective, ROWS)
    report = loop.step(loop.prompts.draw(0, min(PROMPTS, loop.prompts_per_step)), Progress(0, total))
    seconds = sum(report.ledger.seconds.values())
    count = len(report.batch.trajectories.condition)
    return f"tried               one step on {count} prompts in {seconds:.1f} s: {_scored(loop, report.metrics)}"


def _scored(loop: AlignmentLoop, metrics: Mapping[str, float]) -> str:
    if "reward" not in metrics:
        return "no reward applies to these prompts"
    known = {name: metrics.get(f"reward/{name}") for name in loop.named_rewards()}
    scores = ", ".join(f"{name}: none" if mean is None else f"{name} {mean:.3f}" for name, mean in known.items())
    spread = metrics.get("reward/group_std")
    if spread is None:  # one sample of each prompt
        return scores
    doubt = "; no prompt's samples differ in reward, so this step taught nothing" if is_even(metrics) else ""
    return f"{scores}, spread within a prompt {spread:.3f}{doubt}"
