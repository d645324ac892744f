"""The folder of a run: what is written, checkpoints, and what can be read out of it again."""
