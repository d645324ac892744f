"""Commands, one module each. The first docstring line is the help; `configure(parser)` and `run(options, overrides)` do the rest.

Large packages such as torch are imported only in `run`.
"""

NAMES = ("train", "check", "sample", "evaluate", "compare", "export", "parts", "check-part", "prompts", "serve-reward", "bundle")
"""Names of the commands in the order of `diffalign --help`; the command "a-b" is in a_b.py."""
