"""Where the data that ships with the package lies. Paths only: importing this imports nothing of the package."""

from pathlib import Path

SHAPEWORLD = Path(__file__).parent / "shapeworld"
"""`model/` the embedded pipeline, `prompts/` its lists, `runs/` the built-in runs."""

DIGITS = Path(__file__).parent / "digits"
"""Real handwriting: `model/` the embedded flow, `data/` the pictures, `prompts/` its lists, `runs/` the built-in runs."""

WORLDS = {"shapeworld": SHAPEWORLD, "digits": DIGITS}
"""The embedded worlds by name."""
