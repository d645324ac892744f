"""Noise grids of diffusers' flow-matching schedulers, computed without changing a scheduler."""

from typing import Any

import numpy as np
from torch import Tensor


def flow_sigmas(scheduler: Any, steps: int, mu: float, *, uniform: bool) -> Tensor:
    """Sigmas that a pipeline would use: [steps + 1], float32.

    Args:
        scheduler: scheduler of the pipeline; not changed. Of a scheduler other than Euler's (Sana ships a solver of higher order) only the
            shift is used, for an Euler grid, because every step of a policy is of first order
        steps: denoising steps
        mu: log-shift, used if the scheduler shifts dynamically
        uniform: whether the pipeline gives the scheduler sigmas 1 .. 1/steps, instead of leaving them to the scheduler
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = dict(scheduler.config)
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        own = FlowMatchEulerDiscreteScheduler.from_config(config)
    else:
        own = FlowMatchEulerDiscreteScheduler(shift=config.get("flow_shift") or config.get("shift") or 1.0)
    arguments: dict[str, Any] = {"mu": mu} if own.config.use_dynamic_shifting else {}
    if uniform:
        own.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **arguments)
    else:
        own.set_timesteps(steps, **arguments)
    result: Tensor = own.sigmas.float()
    return result
