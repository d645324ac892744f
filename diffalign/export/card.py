"""Model card of exported weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import attrs
import yaml

from diffalign.core import Policy
from diffalign.core.unessential import say_once
from diffalign.evaluation.recorded import basis, places
from diffalign.policies import FlowMatchingPolicy

from .unwrapping import inwards
from .usage import STEPS, own_usage, usage

_COMFYUI = "Put `comfyui_lora.safetensors` into ComfyUI's `models/loras` and load it with a LoRA loader node at strength 1."


@attrs.frozen
class Card:
    """Facts about a run for the model card.

    Args:
        objective: class of the objective
        rewards: names of the rewards
        sampler: class of the sampler
        steps: training steps done
        measured: rows (measure, before, after), where before may be empty
        source: description of where `measured` comes from
        sampled: denoising steps of the run's evaluation, or of its rollouts if it has none
        role: role of the exported weights in the run, such as "average"; "" if it is not known
    """

    objective: str = ""
    rewards: tuple[str, ...] = ()
    sampler: str = ""
    steps: int | None = None
    measured: tuple[tuple[str, str, str], ...] = ()
    source: str = ""
    sampled: int | None = None
    role: str = ""

    @classmethod
    def of_run(cls, folder: Path, steps: int | None = None, role: str = "") -> "Card":
        """Read the facts from the files of a run folder, as far as they exist.

        Args:
            folder: run folder with config.yaml, and with evaluation.json or metrics.jsonl
            steps: training steps of the exported weights
            role: their role. The measurements are those of the weights that the run evaluates: see `unmeasured`
        """
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) if (folder / "config.yaml").exists() else {}
        measured, source = _evaluated(folder, steps)
        if not measured:
            measured, source = _trained(folder, steps)
        facts = _name(config.get("objective")), _rewards(config.get("rewards")), _name(config.get("sampler"))
        return cls(*facts, steps, measured, source, _sampled(config), role)

    def unmeasured(self) -> "Card":
        """The card of other weights of the same run: without the measurements, which say nothing of them."""
        return attrs.evolve(self, measured=(), source="")

    def text(self, policy: FlowMatchingPolicy, form: str, around: Policy | None = None) -> str:
        """Write the card as Markdown with the hub's front matter.

        Args:
            policy: the exported policy
            form: one of the formats
            around: the same policy with its guidance and its student's steps; None if there is nothing around it
        """
        base = policy.family.source or "unknown"
        licence = base_licence(policy)
        front: dict[str, Any] = {"base_model": base, "library_name": "diffusers", "pipeline_tag": "text-to-image"}
        front |= {"license": licence} if licence else {}
        front["tags"] = ["diffalign", "text-to-image", *([] if form == "merged" else ["lora"])]
        kind = "Weights" if form == "merged" else "LoRA adapters"
        about = {
            "base": f"{base} ({type(policy.family.pipeline).__name__})",
            **_files(policy),
            "licence of the base": licence or "not stated in the base's folder: look at its model card before you pass this on",
        }
        head = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {kind} for {base}", ""]
        code = _COMFYUI if form == "comfyui" else f"```python\n{usage(around or policy, policy, form == 'merged', self.sampled)}\n```"
        return "\n".join([*head, *self._body(about), code, ""])

    def plain(self, policy: Policy) -> str:
        """Write the card of a policy that saves itself.

        Args:
            policy: the exported policy, with its guidance and its student's steps around it
        """
        *_, inner = inwards(policy)
        name = type(inner).__name__
        return "\n".join([f"# Weights of a {name}", "", *self._body({}), f"```python\n{own_usage(policy)}\n```", ""])

    def _body(self, about: Mapping[str, str]) -> list[str]:
        """Write the facts of the training, the measurements, and the heading of the section on use."""
        from diffalign import __version__

        about = {
            **about,
            "objective": self.objective or "unknown",
            "rewards": ", ".join(self.rewards) or "unknown",
            "sampler": self.sampler or "unknown",
            "training steps": "unknown" if self.steps is None else str(self.steps),
            **({"role in the run": self.role} if self.role else {}),
        }
        lines = [
            f"Trained with diffalign {__version__}.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in about.items()),
        ]
        if self.measured:
            lines += ["", f"## Measured ({self.source})", "", "| | before | after |", "|---|---|---|"]
            lines += [f"| {what} | {before} | {after} |" for what, before, after in self.measured]
        else:
            lines += ["", "Nothing was measured on these weights."]
        return [*lines, "", "## Use", ""]


def base_licence(policy: FlowMatchingPolicy) -> str:
    """Licence that the base's own model card names in its front matter; "" if it names none.

    A card that cannot be read is no error: a line on stderr says so once, and the licence stays empty.
    """
    return "" if policy.family.folder is None else _licence(policy.family.folder / "README.md")


def _files(policy: FlowMatchingPolicy) -> dict[str, str]:
    """Facts about the base's files beside their place."""
    source = policy.family.loaded_from
    if source is None:
        return {}
    said = {"sub-folder": source.subfolder, "revision": source.revision, "variant of the files": source.variant}
    said["weights in place of the base's"] = source.single_file
    return {name: value for name, value in said.items() if value is not None}


def _licence(file: Path) -> str:
    try:
        if not file.is_file():
            return ""
        front = yaml.safe_load(_front_matter(file.read_bytes().decode("utf-8-sig", errors="replace")))
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a text that looks like a date and is none
        say_once(f"{file}: the licence of the base cannot be read: {str(error).splitlines()[0]}")
        return ""
    named = (front.get("license_name") or front.get("license") or "") if isinstance(front, Mapping) else ""
    words = named if isinstance(named, list) else [named]
    words = [word for word in words if not isinstance(word, list | Mapping)]  # what is nested may be endless
    return ", ".join(" ".join(str(word).replace("|", "/").split()) for word in words)


def _front_matter(text: str) -> str:
    """Text between a first line --- and the next such line; "" if the first line is another."""
    first, *lines = text.lstrip().split("\n")
    rules = [place for place, line in enumerate(lines) if line.rstrip() in ("---", "...")]
    return "\n".join(lines[: rules[0]]) if first.rstrip() == "---" and rules else ""


def _name(part: Any) -> str:
    """Name of a part: its class (SoftmaxTB), its class and constructor (SoftmaxTB.release_compatible), or a function."""
    path = part.get("class_path", "") if isinstance(part, Mapping) else part or ""
    words = str(path).replace(":", ".").split(".")
    classes = [place for place, word in enumerate(words) if word[:1].isupper()]
    return ".".join(words[classes[-1] :] if classes else words[-1:])


def _sampled(config: Mapping[str, Any]) -> int | None:
    """Number of steps by which pictures of a run are drawn; None if its configuration does not say one."""
    evaluation = config.get("evaluation")
    given = evaluation.get("init_args") if isinstance(evaluation, Mapping) else None
    if isinstance(given, Mapping) and "steps" in given:
        return _steps(evaluation) or STEPS
    return _steps(config.get("sampler"))


def _steps(part: Any) -> int | None:
    """Number of steps of a sampler or an evaluation in a configuration; None if it does not say one."""
    given = part.get("init_args") if isinstance(part, Mapping) else None
    steps = given.get("steps") if isinstance(given, Mapping) else None
    return steps if isinstance(steps, int) else None


def _rewards(part: Any) -> tuple[str, ...]:
    if isinstance(part, Mapping) and "class_path" not in part:
        return tuple(map(str, part))
    return (_name(part),) if part else ()


def _evaluated(folder: Path, steps: int | None) -> tuple[tuple[tuple[str, str, str], ...], str]:
    """Rows of the evaluation of these weights, compared with the first evaluation."""
    file = folder / "evaluation.json"
    entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    last = next((entry for entry in reversed(entries) if steps is None or entry["step"] == steps), None)
    if last is None:
        return (), ""
    first = [entries[0]] if entries[0]["step"] == 0 and last["step"] != 0 else []
    rows, apart = [], False
    for kind in ("rewards", "diversity"):
        for name, value in last[kind].items():
            known = [entry for entry in first if name in entry[kind]]
            alike = [entry for entry in known if basis(entry) == basis(last) and places(entry, kind, name) == places(last, kind, name)]
            apart = apart or len(alike) < len(known)
            rows.append((f"{kind.removesuffix('s')} {name}", "".join(f"{entry[kind][name]:.4f}" for entry in alike), f"{value:.4f}"))
    prompts, samples = len(last.get("by_prompt", ())), last.get("samples", "?")
    source = f"held-out evaluation at step {last['step']}: {prompts} prompts, {samples} samples each"
    return tuple(rows), source + ("; before is empty where prompts or settings were others" if apart else "")


def _trained(folder: Path, steps: int | None, window: int = 10) -> tuple[tuple[tuple[str, str, str], ...], str]:
    """Rows of the training metrics: means over the first and the last few steps, at most half of them each; none of a single step."""
    file = folder / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]  # a crash may have cut off the last one
    lines = [line for line in lines if steps is None or line["step"] < steps]
    count = min(window, len(lines) // 2)
    if not count:
        return (), ""
    rows = []
    for name in dict.fromkeys(name for line in lines[-count:] for name in line):
        if name == "reward" or name.startswith(("reward/", "diversity/")):
            # a step may hold nothing of a source, and then has no number of it
            before, after = ([line[name] for line in part if name in line] for part in (lines[:count], lines[-count:]))
            rows.append((name, f"{sum(before) / len(before):.4f}" if before else "", f"{sum(after) / len(after):.4f}"))
    return tuple(rows), f"while training, means over the first and the last {count} steps; not held out"
