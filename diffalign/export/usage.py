"""Code on a model card: draws with exported weights in plain diffusers as the policy does, with its steps, guidance and text length."""

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from diffalign.core import Guided, Policy
from diffalign.policies import FlowMatchingPolicy, TDMPolicy
from diffalign.policies.diffusers import Family

from .unwrapping import inwards

STEPS = 28
"""Denoising steps where neither the policy nor its run says how many."""

_EMBEDDED = "shapeworld"
_TRUE_SCALE = "true_cfg_scale"


def usage(policy: Policy, inner: FlowMatchingPolicy, merged: bool, steps: int | None = None) -> str:
    """Write a Python program that draws one picture, to be run in the folder of the weights.

    A policy whose noise grid is not that of the pipeline's scheduler hands its own sigmas over, to a scheduler without a shift; so
    do few-step students.

    Args:
        policy: the exported policy, with its guidance and its student's steps around it
        inner: policy over the pipeline, inside it
        merged: whether the folder holds the whole pipeline, and not adapters alone
        steps: denoising steps; None takes the first number of a few-step student, else 28
    """
    family = inner.family
    count = next(iter(policy.step_counts), None) or steps or STEPS
    imports = {"diffusers": {"DiffusionPipeline"}}
    lines = []
    if family.dtype != torch.float32:
        imports["torch"] = set()
    arguments = _call(policy, family, count)
    if (scheduler := _scheduler(policy, family, count, arguments)) is not None:
        imports["diffusers"].add(scheduler[0])
        lines.append(f"pipeline.scheduler = {scheduler[1]}")
    base = '"."' if merged else _base(family)
    if base.startswith("SHAPEWORLD"):
        imports["diffalign.embedded"] = {"SHAPEWORLD"}
    loading = [base, *(f"{part}=None" for part in family.optional if getattr(family.pipeline, part, None) is None)]
    loading += [f"torch_dtype={family.dtype}"] if family.dtype != torch.float32 else []
    here = "  # this folder"
    head = [f"pipeline = DiffusionPipeline.from_pretrained({', '.join(loading)}){here if merged else ''}"]
    head += [] if merged else [f'pipeline.load_lora_weights("."){here}']
    prompt = json.dumps(_prompt(policy, family), ensure_ascii=False)
    drawing = _drawing({"prompt": prompt, **arguments})
    return "\n".join([*_imports(imports), "", *head, *lines, *drawing, 'image.save("picture.png")'])


def _imports(found: dict[str, set[str]]) -> Iterator[str]:
    if "torch" in found:
        yield "import torch"
    for module in ("diffusers", "diffalign.embedded"):
        if module in found:
            yield f"from {module} import {', '.join(sorted(found[module]))}"


def _drawing(arguments: Mapping[str, str]) -> list[str]:
    """The call of the pipeline; one argument a line, where a line would be long."""
    parts = [f"{name}={value}" for name, value in arguments.items()]
    line = f"image = pipeline({', '.join(parts)}).images[0]"
    return [line] if len(line) <= 120 else ["image = pipeline(", *(f"    {part}," for part in parts), ").images[0]"]


def _base(family: Family) -> str:
    if family.source == _EMBEDDED:
        return 'SHAPEWORLD / "model"'  # it ships with diffalign
    return json.dumps(family.source, ensure_ascii=False)


def _prompt(policy: Policy, family: Family) -> str:
    text = "three red circles" if family.source == _EMBEDDED else "a lighthouse at night"
    student = next((each for each in inwards(policy) if isinstance(each, TDMPolicy)), None)
    return text if student is None else text + student.tag.format(steps=student.steps)


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
    if guided is not None and "negative_prompt" in known and (guided.negative or _TRUE_SCALE in known):
        arguments["negative_prompt"] = json.dumps(guided.negative, ensure_ascii=False)
    if "max_sequence_length" in known:
        arguments["max_sequence_length"] = str(family.max_sequence_length)
    if "use_resolution_binning" in known:
        arguments["use_resolution_binning"] = "False"
    return arguments | {"height": str(height), "width": str(width)}


def _scheduler(policy: Policy, family: Family, steps: int, arguments: dict[str, Any]) -> tuple[str, str] | None:
    """Class and code of a scheduler that walks the policy's grid, where the pipeline's own does not; sigmas join the arguments."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    own = family.pipeline.scheduler
    if not family.free_grid:
        name = type(own).__name__
        return name, f'{name}.from_config(pipeline.scheduler.config, timestep_spacing="trailing")'
    sigmas = policy.sigmas(steps)
    plain = isinstance(own, FlowMatchEulerDiscreteScheduler)
    if plain and torch.allclose(sigmas, family.sigmas(steps), atol=1e-5):
        return None
    arguments["sigmas"] = f"[{', '.join(f'{float(sigma):.6g}' for sigma in sigmas[:-1])}]"
    name = FlowMatchEulerDiscreteScheduler.__name__
    return name, f"{name}()  # it takes the sigmas as they are, and does Euler steps between them"
