"""Docstrings that a reader understands at once: they begin with a verb or a noun, and so do the descriptions of arguments."""

import ast
import re
from pathlib import Path

import pytest

import diffalign

ROOT = Path(diffalign.__file__).parent
FIRST = {
    "of",
    "that",
    "as",
    "what",
    "whether",
    "in",
    "for",
    "how",
    "where",
    "which",
    "whose",
    "when",
    "while",
    "than",
    "from",
    "by",
    "with",
    "at",
    "to",
    "those",
    "these",
    "it",
    "they",
    "so",
    "if",
}
ARGUMENT = re.compile(r"^ +[a-z_]\w*(?:, \w+)*: (of|as|that|what|how|which|whose|by which|where)\b(.*)$", re.MULTILINE)


def docstrings(source):
    """Line and text of every docstring: of modules, classes and functions, and of names that one follows."""
    for node in ast.walk(ast.parse(source)):
        for place, statement in enumerate(getattr(node, "body", []) if not isinstance(node, ast.Lambda | ast.IfExp) else []):
            value = statement.value if isinstance(statement, ast.Expr) else None
            documents = place == 0 or isinstance(node.body[place - 1], ast.Assign | ast.AnnAssign)
            if documents and isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def riddles(source):
    """Beginnings that have to be read twice, each with its line."""
    for line, text in docstrings(source):
        if (words := text.split()) and words[0].strip('"`,:;.').lower() in FIRST:
            yield f"{line}: {text.splitlines()[0][:80]}"
        yield from (f"{line + text[: found.start()].count(chr(10))}: {found[0].strip()}" for found in ARGUMENT.finditer(text))


@pytest.mark.parametrize("room", sorted({file.relative_to(ROOT).parts[0] for file in ROOT.rglob("*.py")}))
def test_docstrings_begin_with_a_verb_or_a_noun(room):
    files = sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / room]
    found = [f"{file.relative_to(ROOT.parent)}:{riddle}" for file in files for riddle in riddles(file.read_text(encoding="utf-8"))]
    assert not found, "say what it is, or what it does:\n" + "\n".join(found)


def test_a_riddle_is_found():
    text = '"""Whether it is.\n\n    Args:\n        a: of the run\n        b: whether it is\n    """'
    source = f'"""Rows."""\nx = 1\n"""Of the run."""\ndef f(a, b):\n    {text}\n'
    assert list(riddles(source)) == ["3: Of the run.", "5: Whether it is.", "8: a: of the run"]
