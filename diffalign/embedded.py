"""Where the data that ships with the package lies. Paths only: importing this imports nothing of the package."""

from pathlib import Path

SHAPEWORLD = Path(__file__).parent / "shapeworld"
"""`model/` the embedded pipeline, `prompts/` its lists, `runs/` the built-in runs."""
