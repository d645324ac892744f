"""Configuration: YAML whose keys are the constructor arguments of the parts, so that there is no second list of fields.

jsonargparse checks plain values against their annotations; `resolution` finds the parts and gives every error its place.
"""

from .errors import ConfigWarning
from .files import built_in, locate
from .run import Run, parse, parse_text

__all__ = ["ConfigWarning", "Run", "built_in", "locate", "parse", "parse_text"]
