"""Policies: diffusers pipelines and closed forms."""

from .analytic import GaussianMixturePolicy
from .flow_matching import FlowMatchingPolicy, LoRA

__all__ = ["FlowMatchingPolicy", "GaussianMixturePolicy", "LoRA"]
