"""Policies: diffusers pipelines, networks of your own, and closed forms."""

from .analytic import GaussianMixturePolicy
from .call_graphs import CallGraphs
from .compilation import Compilation
from .flow_matching import FlowMatchingPolicy
from .lora import LoRA
from .network import NetworkPolicy
from .student_files import StudentFiles
from .tdm import TDMPolicy

__all__ = ["CallGraphs", "Compilation", "FlowMatchingPolicy", "GaussianMixturePolicy", "LoRA", "NetworkPolicy", "StudentFiles", "TDMPolicy"]
