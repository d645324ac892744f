"""Folder of a run: writing it, checkpoints, and reading it again."""
