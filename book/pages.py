"""For mkdocs: the pages of the API, and files outside docs/ that a page links to."""

import importlib
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from public_names import kinds

ROOT = Path(__file__).parents[1]
LOWER = "    options:\n      heading_level: 3\n"
OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add a page for each public module of the table of contents, and every linked file of the checkout under files/."""
    for name in _modules(config["nav"]):
        files.append(File.generated(config, f"api/{name}.md", content=_page(name)))
    for page in [file for file in files if file.is_documentation_page()]:
        for target in OUTSIDE.findall(page.content_string):
            if files.get_file_from_path(_copy(target)) is None:
                files.append(File.generated(config, _copy(target), content=(ROOT / target).read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links out of docs/ lead to the copies."""
    return OUTSIDE.sub(lambda found: f"]({_copy(found[1])})", markdown)


def _copy(target: str) -> str:
    """Where a file of the checkout lies in the book; Markdown as text, because its own links begin elsewhere."""
    return f"files/{target}.txt" if target.endswith(".md") else f"files/{target}"


def _modules(nav: list[Any]) -> list[str]:
    entries = [entry for item in nav for entry in (next(iter(item.values())) if isinstance(item, dict) else [item])]
    return [Path(entry).stem for entry in entries if str(entry).startswith("api/")]


def _page(name: str) -> str:
    module = importlib.import_module(name)
    text, parted = f"# {name}\n\n{module.__doc__}\n", kinds(module)
    for kind, names in parted.items():
        if len(parted) > 1:  # in the order of reading, as the module has them
            text += f"\n## {kind}\n"
        text += "".join(f"\n::: {name}.{public}\n{LOWER if len(parted) > 1 else ''}" for public in names)
    return text
