"""Objectives."""

from .softmax_tb import SoftmaxTB

__all__ = ["SoftmaxTB"]
