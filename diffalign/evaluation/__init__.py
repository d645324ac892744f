"""Evaluation, pictures and the report."""

from .evaluate import Evaluation, HeldOutEvaluation, evaluate, paired_change
from .report import write_report

__all__ = ["Evaluation", "HeldOutEvaluation", "evaluate", "paired_change", "write_report"]
