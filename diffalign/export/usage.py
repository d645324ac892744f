"""Code on a model card: draws with exported weights in plain diffusers as the policy does, with its steps, guidance and text length."""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from diffalign.config.parts import import_path
from diffalign.core import Guided, Policy
from diffalign.policies import FlowMatchingPolicy, TDMPolicy
from diffalign.policies.diffusers import Family

from .base_loading import EMBEDDED, Imports, absent, base_loading, quoted
from .unwrapping import inwards

STEPS = 28
"""Denoising steps where neither the policy nor its run says how many."""

_TRUE_SCALE = "true_cfg_scale"
_HERE = "  # this folder"
_ORDER = ("diffusers", "huggingface_hub", "diffalign.embedded")


def usage(policy: Policy, inner: FlowMatchingPolicy, merged: bool, steps: int | None = None) -> str:
    """Write a Python program that draws one picture, to be run in the folder of the weights.

    A policy whose noise grid is not that of the pipeline's scheduler hands its own sigmas over, to a scheduler without a shift; so
    do few-step students. UNets hand their timesteps over, to a scheduler of first order without noise.

    Args:
        policy: the exported policy, with its guidance and its student's steps around it
        inner: policy over the pipeline, inside it
        merged: whether the folder holds the whole pipeline, and not adapters alone
        steps: denoising steps; None takes the first number of a few-step student, else 28
    """
    family = inner.family
    count = next(iter(policy.step_counts), None) or steps or STEPS
    imports: Imports = {"diffusers": {"DiffusionPipeline"}}
    lines = []
    arguments = _call(policy, family, count)
    if (scheduler := _scheduler(policy, family, count, arguments)) is not None:
        imports["diffusers"].add(scheduler[0])
        lines.append(f"pipeline.scheduler = {scheduler[1]}")
    head = _merged(family, imports) if merged else [*base_loading(family, imports), f'pipeline.load_lora_weights("."){_HERE}']
    prompt = quoted(_prompt(policy, family))
    drawing = _drawing({"prompt": prompt, **arguments})
    return "\n".join([*_imports(imports), "", *head, *lines, *drawing, 'image.save("picture.png")'])


def own_usage(policy: Policy) -> str:
    """Write a Python program that loads a policy that saves itself, to be run in the folder of its weights.

    Args:
        policy: the exported policy, with its guidance and its student's steps around it
    """
    imports: dict[str, set[str]] = {}
    lines: list[str] = []
    for each in reversed(list(inwards(policy))):
        module, _, name = import_path(type(each), type(each).__name__).rpartition(".")
        if isinstance(each, TDMPolicy):
            lines.append(f"policy = {name}({_student(each)})  # {_numbers(each)} on these sigmas, and no others")
        elif isinstance(each, Guided):
            lines.append(f"policy = {name}(policy, {each.scale!r}, {quoted(each.negative)})")
        elif not lines:
            lines.append(f'policy = {name}.from_pretrained("."){_HERE}')
        else:  # it changes no weight, and nothing is known of how it is built
            continue
        imports.setdefault(module, set()).add(name)
    return "\n".join([*(f"from {module} import {', '.join(sorted(imports[module]))}" for module in sorted(imports)), "", *lines])


def _student(policy: TDMPolicy) -> str:
    """Arguments of a few-step student, as they are written."""
    main, *also = policy.step_counts
    grids = [f"[{', '.join(map(_shortest, policy.at(count).sigmas(count).tolist()))}]" for count in policy.step_counts]
    arguments = {"steps": str(main), "grid": f"[{', '.join(grids)}]" if also else grids[0]}
    arguments |= {"tag": quoted(policy.tag)} if policy.tag else {}
    arguments |= {"also": str(also)} if also else {}
    return ", ".join(["policy", *(f"{name}={value}" for name, value in arguments.items())])


def _numbers(policy: TDMPolicy) -> str:
    counts = " or ".join(map(str, policy.step_counts))
    return f"{counts} step{'s' * (counts != '1')}"


def _shortest(level: float) -> str:
    """Shortest text that is read as the same number in float32."""
    return np.format_float_positional(np.float32(level), trim="-")


def _merged(family: Family, imports: Imports) -> list[str]:
    arguments = ['"."', *absent(family)]
    if family.dtype != torch.float32:
        imports["torch"] = set()
        arguments.append(f"torch_dtype={family.dtype}")
    return [f"pipeline = DiffusionPipeline.from_pretrained({', '.join(arguments)}){_HERE}"]


def _imports(found: Imports) -> Iterator[str]:
    yield from (f"import {module}" for module, names in found.items() if not names)
    yield from (f"from {module} import {', '.join(sorted(found[module]))}" for module in _ORDER if module in found)


def _drawing(arguments: Mapping[str, str]) -> list[str]:
    """The call of the pipeline; one argument a line, where a line would be long."""
    parts = [f"{name}={value}" for name, value in arguments.items()]
    line = f"image = pipeline({', '.join(parts)}).images[0]"
    return [line] if len(line) <= 120 else ["image = pipeline(", *(f"    {part}," for part in parts), ").images[0]"]


def _prompt(policy: Policy, family: Family) -> str:
    return ("three red circles" if family.source == EMBEDDED else "a lighthouse at night") + _tag(policy)


def _tag(policy: Policy) -> str:
    """Text that the students in a policy append to what they are given."""
    return "".join(each.tag.format(steps=each.steps) for each in inwards(policy) if isinstance(each, TDMPolicy))


def _call(policy: Policy, family: Family, steps: int) -> dict[str, str]:
    """Arguments of the pipeline's call, as they are written."""
    known = inspect.signature(type(family.pipeline).__call__).parameters
    height, width = family.size
    guided = next((each for each in inwards(policy) if isinstance(each, Guided) and each.scale != each.no_guidance), None)
    arguments = {"num_inference_steps": str(steps)}
    if family.guidance is not None:
        arguments["guidance_scale"] = f"{family.guidance:g}"
    if _TRUE_SCALE in known:
        arguments[_TRUE_SCALE] = "1.0" if guided is None else f"{guided.scale:g}"
    elif family.guidance is None:
        arguments["guidance_scale"] = f"{family.no_guidance if guided is None else guided.scale:g}"
    if guided is not None and "negative_prompt" in known:
        negative = guided.negative + _tag(guided)
        if negative or _TRUE_SCALE in known:
            arguments["negative_prompt"] = quoted(negative)
    if "max_sequence_length" in known:
        arguments["max_sequence_length"] = str(family.max_sequence_length)
    if "use_resolution_binning" in known:
        arguments["use_resolution_binning"] = "False"
    return arguments | {"height": str(height), "width": str(width)}


def _scheduler(policy: Policy, family: Family, steps: int, arguments: dict[str, Any]) -> tuple[str, str] | None:
    """Class and code of a scheduler that walks the policy's grid, where the pipeline's own does not; the grid joins the arguments."""
    own, sigmas = type(family.pipeline.scheduler).__name__, policy.sigmas(steps)
    plain = family.plain_steps(sigmas)
    if plain.settings is None and own == plain.scheduler and torch.allclose(sigmas, family.sigmas(steps), atol=1e-5):
        return None
    arguments[plain.argument] = f"[{', '.join(f'{level:.6g}' for level in plain.grid)}]"
    made = f"{plain.scheduler}()"
    if plain.settings is not None:
        changed = (f"{name}={quoted(value) if isinstance(value, str) else value}" for name, value in plain.settings.items())
        made = f"{plain.scheduler}.from_config({', '.join(['pipeline.scheduler.config', *changed])})"
    return plain.scheduler, f"{made}  # it takes the {plain.argument} as they are, and does Euler steps between them"
