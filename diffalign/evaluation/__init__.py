"""Evaluation of policies: measures of diversity, comparison of runs, images, the report, and the hacking alarm."""

from .alarm import Alarm, HackingAlarm
from .budgets import Recorded, Standing, at_equal_budgets
from .by_tag import ByTag
from .compare import Comparison
from .compare_page import write_comparison
from .diversity import cosine_distance, cosine_distance_across, effective_modes, modes, vendi_score
from .evaluate import evaluate
from .features import CLIPFeatures, DINOv2Features, Features, PixelFeatures, ShapeWorldFeatures
from .held_out import HeldOutEvaluation
from .intervals import Interval, bootstrap, paired_change, win_rate
from .ms_ssim import ms_ssim, ms_ssim_distance
from .pictures import comparison_sheet, contact_sheet
from .report import write_report
from .result import Evaluation
from .rounds import Rounds

__all__ = [
    "Alarm",
    "ByTag",
    "CLIPFeatures",
    "Comparison",
    "DINOv2Features",
    "Evaluation",
    "Features",
    "HackingAlarm",
    "HeldOutEvaluation",
    "Interval",
    "PixelFeatures",
    "Recorded",
    "Rounds",
    "ShapeWorldFeatures",
    "Standing",
    "at_equal_budgets",
    "bootstrap",
    "comparison_sheet",
    "contact_sheet",
    "cosine_distance",
    "cosine_distance_across",
    "effective_modes",
    "evaluate",
    "modes",
    "ms_ssim",
    "ms_ssim_distance",
    "paired_change",
    "vendi_score",
    "win_rate",
    "write_comparison",
    "write_report",
]
