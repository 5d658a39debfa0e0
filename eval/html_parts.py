"""The parts of a run's page: its style sheet, tables, figures, sections. HTML without scripts.

On a narrow screen a table becomes a list: a row is a block, and each of its cells names its column. A picture fills the
column; a tap opens it at its full size, over the page, and another one closes it. The switch is a checkbox, so it works
without a script and from the keyboard.
"""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from eval.tables import NOT_YET

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MAX_COLUMNS = 6  # evaluations of a kind side by side, the newest
MAX_PNG = 1 << 20  # bytes of a picture that is in the page as it is

STYLE = """
:root { color-scheme: light dark; --text: #1c2024; --dim: #5b646d; --page: #ffffff; --line: #d8dde2; --c0: #0072b2 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e4e7ea; --dim: #9aa4ae; --page: #15181b; --line: #343a41; --c0: #4aa8e0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.5rem; margin: .5rem 0 0 }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line) }
p { margin: .25rem 0 } .dim, figcaption, th { color: var(--dim) }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)); gap: .75rem; margin: 1rem 0 }
.tiles div { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem .75rem }
.tiles b { display: block; font-size: 1.25rem }
figure { margin: 0 } figcaption { font-size: .875rem } figure svg { width: 100%; height: auto; display: block }
img { max-width: 100%; height: auto; display: block; background: #fff; border-radius: .25rem }
.note { border-left: .25rem solid #e69f00; padding-left: .75rem; margin: .5rem 0 }
.zoom { display: block; cursor: zoom-in } .zoom input { position: absolute; opacity: 0 }
.zoom input:focus-visible ~ .full { outline: 2px solid var(--c0) }
.zoom input:checked ~ .full { position: fixed; inset: 0; z-index: 1; overflow: auto; background: var(--page);
  cursor: zoom-out } .zoom input:checked ~ .full img { max-width: none; border-radius: 0 }
.scroll { overflow-x: auto; margin-top: .5rem }
table { border-collapse: collapse; font-size: .875rem; overflow-wrap: normal }
td, th { padding: .2rem .75rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
@media (max-width: 40rem) {
  tr { display: block; padding: .25rem 0; border-bottom: 1px solid var(--line) } tr.head { display: none }
  td, td.n { display: flex; justify-content: space-between; gap: 1rem; padding: .1rem 0; border: 0; text-align: right;
    white-space: normal; overflow-wrap: anywhere } td:first-child { font-weight: 600; text-align: left }
  td:not(:first-child)::before { content: attr(data-column); color: var(--dim); text-align: left; max-width: 60% } }
pre { font-size: .8rem; white-space: pre-wrap; margin: .5rem 0 } summary { cursor: pointer }
"""


def number(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.2f}" if 0.1 <= abs(value) < 1000 else f"{value:.4g}"


def is_number(value: Any) -> bool:
    """Whether a cell is a number, nothing, a number with its spread, or a number that is not there yet."""
    return (
        value in (None, NOT_YET) or isinstance(value, int | float) or bool(re.fullmatch(r"[\d.]+ \(.*\)", str(value)))
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table with a heading; columns of numbers are aligned to the right."""
    rows = [list(row) for row in rows]
    numeric = [n > 0 and all(is_number(row[n]) for row in rows) for n in range(len(head))]

    kinds = [' class="n"' if right else "" for right in numeric]
    names = [f' data-column="{escape(name, quote=True)}"' for name in head]

    def line(row: Sequence[Any]) -> str:
        cells = zip(kinds, names, row, strict=True)
        return "".join(f"<td{kind}{name}>{escape(number(value))}</td>" for kind, name, value in cells)

    heads = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(kinds, head, strict=True))
    body = "".join(f"<tr>{line(row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr class="head">{heads}</tr>{body}</table></div>'


def side_by_side(rows: list[dict[str, Any]], heads: list[str], what: str = "") -> str:
    """Rows of a .jsonl file as columns, the newest MAX_COLUMNS of them: one line per key."""
    rows, heads = rows[-MAX_COLUMNS:], heads[-MAX_COLUMNS:]
    keys = dict.fromkeys(key for row in rows for key in row)
    return table([what, *heads], ([key, *(row.get(key) for row in rows)] for key in keys)) if rows else ""


def document(title: str, body: str, meta: str = "") -> str:
    """A whole page. Its policy: nothing is loaded from anywhere, whatever a name or a value in a run may contain."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>{meta}'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def figure(content: str, caption: str) -> str:
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>" if content else ""


def picture(file: Path, caption: str) -> str:
    """A PNG inside the page, which opens at its full size. A large one, such as of photos, is in the page as WebP."""
    kind, content = "png", file.read_bytes()
    if len(content) > MAX_PNG:
        from PIL import Image

        with Image.open(file) as image, io.BytesIO() as smaller:
            image.convert("RGB").save(smaller, "WEBP", quality=90)
            kind, content = "webp", smaller.getvalue()
    source = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    shown = f'<img alt="{escape(caption, quote=True)}" src="{source}">'
    switch = '<input type="checkbox" aria-label="full size">'
    return figure(f'<label class="zoom">{switch}<div class="full">{shown}</div></label>', caption)


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def grid(figures: Iterable[str], kind: str = "grid") -> str:
    content = "".join(figures)
    return f'<div class="{kind}">{content}</div>' if content else ""
