"""Frame of a self-contained HTML page: style, tables, images that enlarge on a click. No script, no downloads."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5c6675; --line: #d8dde5; --paper: #fff; --card: #f6f8fa;
  --accent: #1f6feb; --faint: #a9c7f5; --alarm: #b42318; --c0: #1f6feb; --c1: #d1570c; --c2: #1a7f37; --c3: #8250df; --c4: #bf3989;
  --c5: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ee; --soft: #9aa4b2; --line: #343c48; --paper: #14181f; --card: #1b212b;
  --accent: #6ea8fe; --faint: #35507a; --alarm: #ff8a7a; --c0: #6ea8fe; --c1: #f0883e; --c2: #56d364; --c3: #bc8cff; --c4: #ff80c8;
  --c5: #b1bac4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; font: 16px/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); overflow-wrap: break-word; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; } p { margin: .3rem 0; }
.soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .4rem 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .95rem; }
td, th { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
.texts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.texts td:first-child { color: var(--soft); width: 9rem; overflow-wrap: normal; }
@media (max-width: 36rem) { table { font-size: .8rem; } td, th { padding: .25rem .3rem; }
  td:first-child, .wrapped td, .wrapped th { white-space: normal; } .wrapped td:last-child { min-width: 9rem; }
  .texts td:first-child { width: 6rem; } }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: 1rem; }
figure { margin: 0; min-width: 0; } figcaption { font-size: .85rem; color: var(--soft); }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
img { max-width: 100%; height: auto; border: 1px solid var(--line); background: #fff; }
a.small { display: block; cursor: zoom-in; }
.big { display: none; position: fixed; inset: 0; overflow: auto; background: rgba(0, 0, 0, .88); padding: 1rem; text-align: center;
  z-index: 1; cursor: zoom-out; }
.big:target { display: block; } .big img { max-width: none; width: max(100%, 40rem); height: auto; image-rendering: auto; }
@media (min-width: 48rem) { .big img { width: auto; } }
.warning { border-left: 4px solid var(--alarm); background: var(--card); padding: .5rem .8rem; margin: .5rem 0; }
.run { display: inline-block; margin-right: 1em; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin: 0 .3em 0 0; vertical-align: baseline; }
pre { overflow-x: auto; padding: .8rem; border: 1px solid var(--line); background: var(--card); font-size: .8rem; }
summary { cursor: pointer; font-size: 1.1rem; font-weight: 700; margin: 2.2rem 0 .6rem; }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Build a whole HTML document; `parts` are HTML, the title is text."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n{chr(10).join(filter(None, parts))}\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Build a table. Cells are text; the first column holds names. A table wider than the screen gets its own scroll bar."""
    top = f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{top}{body}</table></div>'


def details(title: str, text: str) -> str:
    """Build a folded section with a preformatted text; "" for an empty text."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>" if text else ""


def enlargeable(image: Image.Image | Path, name: str, caption: str) -> str:
    """Embed an image that fills the screen after a click and shrinks again after the next.

    Args:
        image: the image, or its PNG file
        name: name of the anchor in the page, unique
        caption: text below it
    """
    if isinstance(image, Path):
        content = image.read_bytes()
    else:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        content = buffer.getvalue()
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    text = escape(caption, quote=True)
    # closing goes back to the figure, not to the top of the page
    return (
        f'<figure id="{name}"><a class="small" href="#{name}-large"><img src="{source}" alt="{text}"></a><figcaption>{text}</figcaption>'
        f'<a class="big" id="{name}-large" href="#{name}"><img src="{source}" alt="{text}, full size"></a></figure>'
    )
