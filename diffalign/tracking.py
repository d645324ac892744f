"""Experiment trackers by accelerate: TensorBoard, W&B, trackio and others, by name."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
import yaml

from .core import AlignmentLoop, Evaluated, Hook, Report
from .core.report import plain
from .core.unessential import unessential

_EXTRAS = ("tensorboard", "wandb", "trackio", "swanlab", "mlflow")

_RUN_NAMES: Mapping[str, str] = {
    "wandb": "name",
    "trackio": "name",
    "swanlab": "experiment_name",
    "mlflow": "run_name",
    "clearml": "task_name",
}
"""Tracker -> argument that names a run within its project."""

_FOLDERS: Mapping[str, str] = {"wandb": "dir", "swanlab": "logdir"}
"""Tracker -> argument that says where it writes, instead of the folder in which the command is given."""


def _names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


@attrs.define(eq=False)
class Trackers(Hook):
    """Sends metrics, held-out evaluations, images and the configuration to trackers. `metrics.jsonl` is written in any case.

    Only the first process sends. A tracker that cannot be started stops the run before its first step; one that fails later is left out
    from then on, with one message. A tracker reads its own environment variables for an account or an offline mode.

    Args:
        names: accelerate's names of trackers: tensorboard, wandb, trackio, mlflow, swanlab, aim, comet_ml, clearml, dvclive
        project: project at a tracker, in which a run has the name of its folder. None takes the name of the run file, so that runs of one
            configuration stand beside each other, and "diffalign" in Python. TensorBoard has no projects
        images_every: steps between images of the step's samples, for trackers that take images; 0 sends none
        pictures: number of images that are sent at a time

    Raises:
        ValueError: accelerate does not know a name.
        ImportError: the tracker's package is not installed; the message names it.
    """

    names: Sequence[str] = attrs.field(default=("tensorboard",), converter=_names)
    project: str | None = None
    images_every: int = attrs.field(default=10, validator=attrs.validators.ge(0))
    pictures: int = attrs.field(default=8, validator=attrs.validators.ge(1))
    _running: dict[str, Any] = attrs.field(factory=dict, init=False, repr=False)
    _configured: bool = attrs.field(default=False, init=False, repr=False)
    _sent: int = attrs.field(default=0, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

        installed = {str(name) for name in get_available_trackers()}  # type: ignore[no-untyped-call]
        for name in self.names:
            if name not in LOGGER_TYPE_TO_CLASS:
                raise ValueError(f"Trackers.names must be of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}; got {name!r}")
            if name not in installed:
                package = f'"diffalign[{name}]"' if name in _EXTRAS else name
                raise ImportError(f"Trackers.names has {name!r}, whose package is not installed: pip install {package}")

    def start(self, loop: AlignmentLoop, step: int, total: int) -> None:
        self._running, self._configured, self._sent = {}, False, 0
        if loop.devices.rank != 0:
            return
        from accelerate.state import PartialState

        PartialState()  # trackers of accelerate write to a log that raises before this
        for name in self.names:
            tracker = self._made(name, (loop.folder or Path("runs") / "unnamed").absolute())
            tracker.start()
            self._running[name] = tracker

    def _made(self, name: str, folder: Path) -> Any:
        """Make a tracker; its project is that of the configuration, and its run is called as the folder."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        project, place = self.project or "diffalign", folder / "trackers"
        if kind.requires_logging_directory:
            return kind(folder.name, place, **({"experiment": project} if name == "aim" else {}))
        options = {_RUN_NAMES[name]: folder.name} if name in _RUN_NAMES else {}
        if name in _FOLDERS:
            place.mkdir(parents=True, exist_ok=True)
            options[_FOLDERS[name]] = str(place)
        return kind(project, **options)

    def step(self, loop: AlignmentLoop, report: Report) -> None:
        if not self._running:
            return
        self._configure(loop)
        ledger = report.ledger
        seconds = {f"seconds/{stage}": value for stage, value in ledger.seconds.items()}
        seconds |= {f"hidden/{stage}": value for stage, value in ledger.hidden.items()}
        self._log({**plain(report.metrics), **seconds, "rows_per_step": float(sum(ledger.rows.values()))}, report.step)
        if self.images_every and len(report.images) and report.step % self.images_every == 0:
            self._show("samples", report.images, report.step)
        self._send_evaluations(loop)

    def stop(self, loop: AlignmentLoop, step: int, error: BaseException | None) -> None:
        if self._running:
            self._send_evaluations(loop)
        self._each(lambda name, tracker: tracker.finish())
        self._running = {}

    def _configure(self, loop: AlignmentLoop) -> None:
        """Send the configuration. It is called at the first step, when the configuration is in the run folder."""
        file = None if loop.folder is None else loop.folder / "config.yaml"
        if not self._configured and file is not None and file.exists():
            values = flattened(yaml.safe_load(file.read_text(encoding="utf-8")) or {})
            self._each(lambda name, tracker: tracker.store_init_configuration(values))
        self._configured = True

    def _send_evaluations(self, loop: AlignmentLoop) -> None:
        for result in loop.evaluations[self._sent :]:
            self._send(result)
        self._sent = len(loop.evaluations)

    def _send(self, result: Evaluated) -> None:
        values = {f"held_out/{name.replace(' ', '/')}": values.mean().item() for name, values in result.measures().items()}
        across = {f"held_out/across/{name}": value for name, value in result.across.items()}
        self._log({**values, **across}, result.step)
        if len(result.images):
            self._show("held_out/samples", result.images.flatten(0, 1), result.step)

    def _log(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda name, tracker: tracker.log(dict(values), step=step))

    def _show(self, name: str, images: torch.Tensor, step: int) -> None:
        pixels = (images[: self.pictures].clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()

        def send(kind: str, tracker: Any) -> None:
            log = getattr(tracker, "log_images", None)  # not every tracker of accelerate takes pictures
            if log is not None:
                log({name: pixels}, step=step, **({"dataformats": "NHWC"} if kind == "tensorboard" else {}))

        self._each(send)

    def _each(self, call: Callable[[str, Any], object]) -> None:
        """Call something on every tracker; one that fails is not called again."""
        for name, tracker in list(self._running.items()):
            del self._running[name]
            with unessential(f"tracker {name}"):
                call(name, tracker)
                self._running[name] = tracker


def flattened(tree: Any, place: str = "") -> dict[str, str | int | float | bool]:
    """Flatten a configuration to one level: {"sampler.init_args.steps": 8}. None values are left out."""
    if isinstance(tree, Mapping | list):
        entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
        flat: dict[str, str | int | float | bool] = {}
        for key, value in entries:
            flat.update(flattened(value, f"{place}.{key}" if place else str(key)))
        return flat
    return {} if tree is None else {place: tree if isinstance(tree, str | int | float | bool) else str(tree)}
