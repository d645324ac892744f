"""Costs of a run, known before it runs: bytes, network rows, and the number of processes that fit."""
