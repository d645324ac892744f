"""UNets of variance-preserving diffusion, converted to the convention of flows.

With a^2 = alphas_cumprod[t] and s^2 = 1 - a^2, the latents are z_t = a x_0 + s noise. Divided by a + s they lie on the straight path of
this package: sigma = s / (a + s), x_sigma = z_t / (a + s). The steps of DDIM and Euler then equal the Euler step of this package (for DDIM
only if the number of steps divides the number of training levels: else it steps to other levels than those of its network calls).
"""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .family import Family, PlainSteps, Setting

_CURVE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr", "prediction_type")
_OTHER_GRIDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
_FIRST_ORDER = {"solver_order": 1, "algorithm_type": "dpmsolver++", "thresholding": False}
_EULER = {"timestep_spacing": "trailing", "timestep_type": "discrete", "interpolation_type": "linear"}
"""Settings of diffusers' schedulers: of the noise, of grids that are not used here, and of deterministic steps of first order."""


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
        if self.setting.max_sequence_length is not None:
            raise ValueError(
                f"max_sequence_length is of text encoders that read longer texts, and a {type(self).__name__} always has the tokens of its "
                f"CLIP; leave it out. Got {self.setting.max_sequence_length}"
            )
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

    def plain_steps(self, sigmas: Tensor) -> PlainSteps:
        import diffusers

        # both are exact for any number of steps, which DDIM is not; DPM-Solver starts at unit noise, Euler at its largest s / a
        top = float(self.levels[-1])
        at_unit = abs(self.prior_scale - ((1 - top) ** 2 + top**2) ** 0.5) <= abs(self.prior_scale - top)
        kind: Any = diffusers.DPMSolverMultistepScheduler if at_unit else diffusers.EulerDiscreteScheduler
        own, read = self.pipeline.scheduler.config, _read_by(self.pipeline.scheduler)
        given = kind.from_config(own).config
        wanted: dict[str, Any] = {"rescale_betas_zero_snr": False, **{name: own[name] for name in _CURVE if name in read}}
        wanted |= {name: False for name in _OTHER_GRIDS if name in given} | (_FIRST_ORDER if at_unit else _EULER)
        wanted["final_sigmas_type"] = "sigma_min" if self.last > 0 else "zero"
        settings = {name: value for name, value in wanted.items() if given[name] != value}
        return PlainSteps(kind.__name__, settings, "timesteps", tuple(self.timestep(sigmas[:-1]).tolist()))

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
            timestep_cond=self._guidance_input(latents),
            **self.extra(tensors, latents.shape[-2:]),
            return_dict=False,
        )[0].to(latents.dtype)
        noise = output if self._predicts_noise else a * output + s * state
        clean = (state - s * output) / a if self._predicts_noise else a * state - s * output
        result: Tensor = noise - clean
        return result

    def _reads_guidance(self) -> bool:
        return self.config.get("time_cond_proj_dim") is not None

    def _guidance_input(self, latents: Tensor) -> Tensor | None:
        """Guidance of B rows for a UNet that was distilled with it (latent consistency, arXiv:2310.04378): [B, *]; None for others."""
        if self.guidance is None:
            return None
        wanted, width = torch.tensor([self.guidance - 1.0]), self.config.time_cond_proj_dim

        def embedded() -> Tensor:
            result: Tensor = self.pipeline.get_guidance_scale_embedding(wanted, embedding_dim=width)
            return result.to(self.dtype)

        return self.on_device(("guidance", self.guidance, self.dtype), embedded, latents.device).expand(len(latents), -1)

    def unscale(self, latents: Tensor) -> Tensor:
        last: float = ((1 - self.last) ** 2 + self.last**2) ** 0.5
        return latents / last / float(self.pipeline.vae.config.scaling_factor)


def _read_by(scheduler: Any) -> Collection[str]:
    """Settings that a scheduler reads; its configuration may hold others, of the class that it was made from."""
    return inspect.signature(type(scheduler).__init__).parameters


def _ends_above_zero(scheduler: Any) -> bool:
    """True if the last step leads to the first training level. Keys that this scheduler does not read are ignored."""
    known, config = _read_by(scheduler), scheduler.config
    if "final_sigmas_type" in known:
        return bool(config.final_sigmas_type != "zero")
    return "set_alpha_to_one" in known and not config.set_alpha_to_one
