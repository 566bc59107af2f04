"""What Sphinx gets to read beside the files of docs/: an extension, and the functions that it is made of.

* `configuration.md` gets a table of every field of an experiment, from `mimic_video.config.describe`.
* `contributing.md` and `changelog.md` are the files of the root.
* Notebooks of launch/colab are copied to docs/colab, which git ignores, and listed by `index.md`.
* Links, which are written so that they work on GitHub, lead to pages here where there is one.
"""

import dataclasses
import inspect
import json
import posixpath
import re
import shutil
import typing
from pathlib import Path
from typing import Any

from mimic_video.config import ExperimentConfig, Field, describe

ROOT = Path(__file__).resolve().parent.parent
FIELDS = "<!-- every field of the configuration -->"  # what configuration.md has where its tables go
NOTEBOOKS = "<!-- notebooks -->"  # and index.md where they are listed
FROM_ROOT = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}  # page → the file whose text it gets

_RESUME = {"free": "may change", "extends": "may grow", "fixed": "stays"}
_LINK = re.compile(r"(`+[^`\n]*`+)|(\]\(<?)(?!#|[a-zA-Z][a-zA-Z0-9+.-]*:|//)([^)#\s>]+)")
_FENCE = re.compile(r"(^ *(?:```|~~~).*?^ *(?:```|~~~)[^\n]*$)", re.MULTILINE | re.DOTALL)


def configuration_tables(config_class: Any = ExperimentConfig) -> str:
    """Markdown: a section for the fields of an experiment itself, and one for each of its groups."""
    hints = typing.get_type_hints(config_class)
    groups = [(name, hints[name]) for name in hints if dataclasses.is_dataclass(hints[name])]
    own = [field for field in describe(config_class) if "." not in field.path]
    sections = [("The experiment", config_class, own)]
    sections += [(f"`{name}`", group, describe(group, f"{name}.")) for name, group in groups]
    return "\n\n".join(f"## {title}\n\n{_docstring(group)}\n\n{_table(fields)}" for title, group, fields in sections)


def _docstring(config_class: Any) -> str:
    """That of the class, as Markdown: what is indented in it stays a block."""
    return inspect.cleandoc(config_class.__doc__ or "")


def _table(fields: list[Field]) -> str:
    rows = ["| field | type | default | what it is | when a run goes on | presupposed by |", "|---|---|---|---|---|---|"]
    for field in fields:
        cells = [f"`{field.path}`", f"`{field.type}`", f"`{field.default!r}`", field.help, _RESUME[field.on_resume]]
        cells.append(", ".join(f"`{shaped}`" for shaped in field.shapes))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def linked(text: str, folder: str) -> str:
    """A Markdown text of `folder`, "" or "docs", with relative links as they have to be in docs.

    Those to CONTRIBUTING, CHANGELOG, README and notebooks lead to their pages. Code is left as it is.
    """

    def rebase(match: re.Match) -> str:
        if match[1]:
            return match[1]
        return match[2] + _page(posixpath.normpath(posixpath.join(folder, match[3])))

    parts = _FENCE.split(text)
    return "".join(part if index % 2 else _LINK.sub(rebase, part) for index, part in enumerate(parts))


def _page(path: str) -> str:
    """How docs links to a file, by its path from the root."""
    pages = {file: f"{page}.md" for page, file in FROM_ROOT.items()} | {"README.md": "index.md"}
    if path.startswith("launch/colab/") and path.endswith(".ipynb"):
        return path.removeprefix("launch/")
    return pages.get(path) or posixpath.relpath(path, "docs")


def copy_notebooks(root: Path = ROOT) -> list[Path]:
    """Copies notebooks to docs/colab, from where Sphinx reads them, and removes those that are gone. Returns the copies.

    Cells are marked as what IPython reads, unless a notebook says otherwise: lines that begin with "!" are no Python.
    """
    folder = root / "docs" / "colab"
    shutil.rmtree(folder, ignore_errors=True)
    copies = []
    for notebook in sorted((root / "launch" / "colab").glob("*.ipynb")):
        folder.mkdir(exist_ok=True)
        content = json.loads(notebook.read_text("utf-8"))
        language = content["metadata"].setdefault("language_info", {"name": "python"})
        language.setdefault("pygments_lexer", "ipython3")
        copies.append(folder / notebook.name)
        copies[-1].write_text(json.dumps(content), "utf-8")
    return copies


def toctree(notebooks: list[Path]) -> str:
    """The part of a table of contents that has these; nothing for none."""
    lines = [":caption: Notebooks", ":hidden:", "", *(f"colab/{notebook.stem}" for notebook in notebooks)]
    return "\n".join(["```{toctree}", *lines, "```"]) if notebooks else ""


def page(name: str, text: str, notebooks: list[Path]) -> str:
    """The text of a page as Sphinx reads it, of what stands in its file."""
    if file := FROM_ROOT.get(name):
        return linked((ROOT / file).read_text("utf-8"), "")
    return linked(text, "docs").replace(FIELDS, configuration_tables()).replace(NOTEBOOKS, toctree(notebooks))


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    notebooks = copy_notebooks()

    def read(app: Any, name: str, source: list[str]) -> None:
        if name.startswith("colab/"):
            return
        source[0] = page(name, source[0], notebooks)
        if name in FROM_ROOT:
            app.env.note_dependency(str(ROOT / FROM_ROOT[name]))

    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
