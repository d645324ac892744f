"""UNets of variance-preserving diffusion, converted to the convention of flows.

With a^2 = alphas_cumprod[t] and s^2 = 1 - a^2, the latents are z_t = a x_0 + s noise. Divided by a + s they lie on the straight path of
this package: sigma = s / (a + s), x_sigma = z_t / (a + s). The steps of DDIM and Euler then equal the Euler step of this package (for DDIM
only if the number of steps divides the number of training levels: else it steps to other levels than those of its network calls).
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .family import Family, Setting


class UNetFamily(Family):
    """Shared code of the UNet families.

    The grid takes training levels at even distances, from the last one down ("trailing", arXiv:2305.08891). So every rollout starts at the
    level where the prior is known; a scheduler's own spacing may start below it. The grid ends where the scheduler ends: at 0, or at the
    first training level if the configuration has set_alpha_to_one: false.
    """

    component: ClassVar[str] = "unet"
    comfyui = "unet"
    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    multiple: ClassVar[int] = 8
    free_grid: ClassVar[bool] = False

    def __init__(self, pipeline: Any, setting: Setting | None = None) -> None:
        super().__init__(pipeline, setting)
        scheduler = pipeline.scheduler
        if (prediction := scheduler.config.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction"):
            raise ValueError(f"the scheduler's prediction_type must be epsilon or v_prediction; got {prediction!r}")
        self._predicts_noise = prediction == "epsilon"
        clean = scheduler.alphas_cumprod.double()
        self.levels = (1 - clean).sqrt() / (clean.sqrt() + (1 - clean).sqrt())  # [1000] sigma of each timestep, rising
        self._copies: dict[tuple[Hashable, torch.device], Tensor] = {}
        self.last = float(self.levels[0]) if _ends_above_zero(scheduler) else 0.0
        # a scheduler over s / a (Euler's) starts at its own multiple of unit noise; the others start at unit noise
        top, start = float(self.levels[-1]), float(getattr(scheduler, "init_noise_sigma", 1.0))
        self.prior_scale = start * (1 - top) if start > 1 else ((1 - top) ** 2 + top**2) ** 0.5

    @abstractmethod
    def extra(self, tensors: Mapping[str, Tensor], sides: Sequence[int]) -> dict[str, Any]:
        """Further arguments of the UNet, from the encoded texts and the height and width of the latents."""

    def on_device(self, name: Hashable, constant: Callable[[], Tensor], device: torch.device) -> Tensor:
        """Give a constant on a device, copied at the first call: the host would wait for each copy, and no CUDA graph can record one.

        Args:
            name: all that the constant depends on, because forks and views of other sizes share the copies
            constant: makes the constant on the host
            device: device of the copy
        """
        if device.type == "meta":  # kept, it would count as bytes in use
            return constant().to(device)
        if (name, device) not in self._copies:
            self._copies[name, device] = constant().to(device)
        return self._copies[name, device]

    def prior(self, noise: Tensor) -> Tensor:
        return self.prior_scale * noise

    def sigmas(self, steps: int) -> Tensor:
        count = len(self.levels)
        if steps > count:
            raise ValueError(f"steps must be at most {count}, the number of levels that the UNet was trained on; got {steps}")
        timesteps = (count - torch.arange(steps, dtype=torch.float64) * count / steps).round().long() - 1
        return torch.cat([self.levels[timesteps], torch.tensor([self.last], dtype=torch.float64)]).float()

    def timestep(self, sigma: Tensor) -> Tensor:
        """Convert sigma [B] to timesteps [B]. Trained levels give whole numbers; between them the timestep is interpolated."""
        levels = self.on_device("levels", lambda: self.levels, sigma.device)
        wanted = sigma.double().clamp(levels[0], levels[-1])
        above = torch.searchsorted(levels, wanted).clamp(1, len(levels) - 1)
        low, high = levels[above - 1], levels[above]
        time = above - 1 + (wanted - low) / (high - low)
        near = time.round()
        # a sigma in float32 gives its timestep with an error of 2e-4, but UNets were trained on whole timesteps
        return torch.where((time - near).abs() < 1e-2, near, time).to(torch.float32)

    def velocity(self, network: nn.Module, latents: Tensor, sigma: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        level = sigma.view(-1, 1, 1, 1)
        norm = ((1 - level) ** 2 + level**2).sqrt()  # 1 / (a + s)
        a, s = (1 - level) / norm, level / norm
        state = latents / norm
        output = network(
            state.to(self.dtype),
            self.timestep(sigma),
            tensors["embeds"].to(self.dtype),
            **self.extra(tensors, latents.shape[-2:]),
            return_dict=False,
        )[0].to(latents.dtype)
        noise = output if self._predicts_noise else a * output + s * state
        clean = (state - s * output) / a if self._predicts_noise else a * state - s * output
        result: Tensor = noise - clean
        return result

    def unscale(self, latents: Tensor) -> Tensor:
        last: float = ((1 - self.last) ** 2 + self.last**2) ** 0.5
        return latents / last / float(self.pipeline.vae.config.scaling_factor)


def _ends_above_zero(scheduler: Any) -> bool:
    """True if the last step leads to the first training level. Keys that this scheduler does not read are ignored."""
    known, config = inspect.signature(type(scheduler).__init__).parameters, scheduler.config
    if "final_sigmas_type" in known:
        return bool(config.final_sigmas_type != "zero")
    return "set_alpha_to_one" in known and not config.set_alpha_to_one
