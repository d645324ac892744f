"""Paths of the data that ships with the package. Importing this module imports nothing else of the package."""

from pathlib import Path

SHAPEWORLD = Path(__file__).parent / "shapeworld"
"""Folder of ShapeWorld: `model/` holds the pipeline, `prompts/` the prompt lists, `runs/` the built-in runs."""

DIGITS = Path(__file__).parent / "digits"
"""Folder of the digits: `model/` holds the flow, `data/` the images, `prompts/` the prompt lists, `runs/` the built-in runs."""

PUBLISHED = Path(__file__).parent / "published"
"""Folder of the runs of published models, whose weights do not ship: `runs/`."""

WORLDS = {"shapeworld": SHAPEWORLD, "digits": DIGITS}
"""Folders of the worlds, by name."""
