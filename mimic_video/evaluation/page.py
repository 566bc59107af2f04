"""Pieces of the HTML pages that are written about runs: self-contained, with plots inside, and legible in light and dark.

Arguments are plain text, and escaped, unless they are named as HTML.
"""

import base64
import html
import io
from collections.abc import Sequence
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # colour-blind safe
GREY, LIGHT = "#666666", "#b0b0b0"

_STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --faint: #656d76; --page: #fff; --card: #f6f8fa; --line: #d8dee4; }
@media (prefers-color-scheme: dark) {
  :root { --text: #d5dbe1; --faint: #8d96a0; --page: #14171b; --card: #1c2026; --line: #343a42; } }
body { box-sizing: border-box; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; max-width: 60rem; background: var(--page);
  color: var(--text); font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0; }
h2 { font-size: 1.3rem; margin: 3.25rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.75rem 0 .5rem; }
p, figcaption { margin: .5rem 0; max-width: 46rem; }
.faint, figcaption, caption { color: var(--faint); font-size: .875rem; line-height: 1.5; }
.answer { margin: 1rem 0; padding: .5rem 1.1rem; background: var(--card); border-left: 4px solid #bf8700; border-radius: 4px; }
.answer.yes { border-color: #2da44e; } .answer.no { border-color: #cf222e; } .answer p { max-width: none; }
.scroll, pre { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: .5rem; }
th, td { padding: .32rem .75rem; text-align: left; white-space: nowrap; }
thead, tbody { border-bottom: 1px solid var(--line); } th { font-size: .82rem; font-weight: 600; color: var(--faint); }
th.n, td.n { text-align: right; }
figure { margin: 1.25rem 0; }
img { display: block; max-width: 100%; height: auto; border-radius: 4px; }
img.plot { box-sizing: border-box; width: 100%; background: #fff; border: 1px solid var(--line); }
img.strip { max-width: 32rem; width: 100%; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(var(--cell), 1fr)); gap: .9rem; margin: .75rem 0; }
.grid figure { margin: 0; } .grid img { width: 100%; image-rendering: pixelated; }
summary { cursor: pointer; } pre { padding: .8rem 1rem; background: var(--card); font-size: .8rem; line-height: 1.45; }
"""


def document(title: str, body_html: str) -> str:
    """A whole page, which loads nothing from elsewhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style></head>\n<body>\n{body_html}\n</body></html>\n"
    )


def section(title: str, *parts_html: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n" + "\n".join(parts_html)


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def table(head: Sequence[str], groups: Sequence[Sequence[Sequence[str]]], text_columns: int, caption: str = "") -> str:
    """A table with a rule between groups of rows; columns after the first `text_columns` are aligned right."""

    def line(cells: Sequence[str], tag: str) -> str:
        marks = ["" if i < text_columns else ' class="n"' for i in range(len(cells))]
        return "<tr>" + "".join(f"<{tag}{m}>{html.escape(c)}</{tag}>" for m, c in zip(marks, cells, strict=True)) + "</tr>"

    bodies = "\n".join("<tbody>" + "\n".join(line(row, "td") for row in rows) + "</tbody>" for rows in groups)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f'<div class="scroll"><table>{title}<thead>{line(head, "th")}</thead>\n{bodies}</table></div>'


def image(data: bytes, kind: str, alt: str, caption: str, css: str = "") -> str:
    """A picture inside the page; `kind` is that of its file, such as "png"."""
    text = base64.b64encode(data).decode()
    return (
        f'<figure><img class="{css}" alt="{html.escape(alt)}" src="data:image/{kind};base64,{text}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def grid(cells_html: Sequence[str], width: int, note: str = "") -> str:
    """Figures side by side, each at least `width` rem wide."""
    if not cells_html:
        return ""
    text = f'<p class="faint">{html.escape(note)}</p>' if note else ""
    return f'{text}<div class="grid" style="--cell: {width}rem">' + "\n".join(cells_html) + "</div>"


def png(figure: Any) -> bytes:
    """A figure of matplotlib, drawn; the same figure gives the same bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return file.getvalue()


def plot(figure: Any, alt: str, caption: str) -> str:
    return image(png(figure), "png", alt, caption, "plot")


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def tidy(axes: Any) -> None:
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
