"""Evaluation, pictures and the report."""

from .evaluate import Evaluation, HeldOutEvaluation, evaluate, paired_change
from .pictures import contact_sheet
from .report import write_report

__all__ = ["Evaluation", "HeldOutEvaluation", "contact_sheet", "evaluate", "paired_change", "write_report"]
