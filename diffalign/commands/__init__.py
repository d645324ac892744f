"""The commands: one module each, with its docstring's first line as help, `configure(parser)` and `run(options, overrides)`.

Nothing heavy is imported before `run`.
"""

NAMES = ("train", "check", "sample", "evaluate", "compare", "export", "parts", "check-part", "prompts", "serve-reward", "bundle")
"""In the order of `diffalign --help`; "a-b" lives in a_b.py."""
