"""Digits: real handwriting that ships with the package. A flow that reads prompts, a judge, rewards, and measures with a known optimum."""

from .grammar import FAMILIES, Wish, parse, prompt_split
from .handwriting import Handwriting, everything, split
from .judge import probabilities
from .measures import class_shares, distance_to_real, effective_classes, kl, tilt
from .policy import DigitsPolicy
from .rewards import ClassReward, DigitReward, LikesReward, ThicknessReward

__all__ = [
    "FAMILIES",
    "ClassReward",
    "DigitReward",
    "DigitsPolicy",
    "Handwriting",
    "LikesReward",
    "ThicknessReward",
    "Wish",
    "class_shares",
    "distance_to_real",
    "effective_classes",
    "everything",
    "kl",
    "parse",
    "probabilities",
    "prompt_split",
    "split",
    "tilt",
]
