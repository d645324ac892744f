"""Result of a run."""

from collections.abc import Mapping
from pathlib import Path

import attrs


@attrs.frozen
class Outcome:
    """Result of a finished run.

    Args:
        steps: number of steps done in total
        metrics: metrics by name of each step of this call, in order, as in `metrics.jsonl`
        seconds: duration of this call
        folder: folder of the run; None if there is none
    """

    steps: int
    metrics: tuple[Mapping[str, float], ...]
    seconds: float
    folder: Path | None = None

    @property
    def rewards(self) -> list[float]:
        """Mean raw reward of each step; steps in which no reward applied to any sample are left out."""
        return [line["reward"] for line in self.metrics if "reward" in line]

    @property
    def diversity(self) -> list[float]:
        """Mean L-GMD of each step; without steps that had one sample of each prompt, which have none."""
        return [line["diversity/l_gmd"] for line in self.metrics if "diversity/l_gmd" in line]

    @property
    def paths(self) -> dict[str, Path]:
        """Files that exist in the run folder: metrics, report, lora, card, pictures, best, checkpoint (the last)."""
        if self.folder is None:
            return {}
        named = {
            "metrics": self.folder / "metrics.jsonl",
            "report": self.folder / "report.html",
            "lora": self.folder / "lora",
            "card": self.folder / "lora" / "README.md",
            "pictures": self.folder / "images" / "before-after.png",
            "best": self.folder / "best",
        }
        if checkpoints := sorted(self.folder.glob("step-*[0-9]")):
            named["checkpoint"] = checkpoints[-1]
        return {name: path for name, path in named.items() if path.exists()}

    def __str__(self) -> str:
        if not self.metrics:
            return f"{self.steps} steps; nothing was left to do"
        lines = [f"{self.steps} steps, {self.seconds:.0f} s"]
        for name, numbers in (("reward", self.rewards), ("diversity", self.diversity)):
            lines += [f"  {name:<9} {numbers[0]:.3f} -> {numbers[-1]:.3f}"] if numbers else []
        return "\n".join([*lines, *(f"  {name:<9} {path}" for name, path in self.paths.items())])
