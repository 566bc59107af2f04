"""The notebooks of launch/colab: read as what they say, and run as a person would, with other parameters.

What reads needs nothing but the standard library; what runs needs the extra `notebook`.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "launch" / "colab").glob("*.ipynb"))

_LINE = re.compile(r"^(\s*)[!%].*$", re.MULTILINE)  # commands of the shell, and magics


class Cell(NamedTuple):
    """A cell's kind, code or markdown; its text; its tags; all else that is stored of it."""

    kind: str
    source: str
    tags: tuple[str, ...]
    stored: Mapping[str, Any]


def cells(path: Path) -> list[Cell]:
    stored = json.loads(path.read_text("utf-8"))["cells"]
    return [Cell(c["cell_type"], "".join(c["source"]), tuple(c["metadata"].get("tags", ())), c) for c in stored]


def text(path: Path) -> str:
    """All that a notebook says, cell by cell."""
    return "\n\n".join(cell.source for cell in cells(path))


def python(source: str) -> str:
    """A code cell without what only IPython understands, of as many lines."""
    joined = source.replace("\\\n", "\\\\")
    return _LINE.sub(lambda line: line[1] + "pass" + "\n" * line[0].count("\\\\"), joined)


def parameters(path: Path) -> dict[str, Any]:
    """What the cell tagged `parameters` sets."""
    values: dict[str, Any] = {}
    exec(next(cell.source for cell in cells(path) if "parameters" in cell.tags), {}, values)
    return values


def execute(path: Path, folder: Path, until: str = "", **changes: Any) -> list[Any]:
    """Runs a notebook in the repository, its parameters followed by others.

    Args:
        folder: where the notebook goes with what it showed, for people to look at when something is wrong.
        until: what a line of the last cell that is run begins with; all are if it is empty.
        changes: parameters by their names. One that there is not is a mistake.

    Returns:
        The cells of code as nbformat has them, with outputs.

    Raises:
        nbclient.exceptions.CellExecutionError: as soon as a cell fails, with all that it printed.
    """
    import nbformat
    from nbclient import NotebookClient

    if unknown := changes.keys() - parameters(path).keys():
        raise ValueError(f"{path.name} has no parameters {', '.join(sorted(unknown))}")
    notebook = nbformat.read(path, as_version=4)
    (at,) = (index for index, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ()))
    assigned = "\n".join(f"{name} = {value!r}" for name, value in changes.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(assigned))
    if until:
        (last,) = (index for index, cell in enumerate(notebook.cells) if re.search(f"^\\s*{re.escape(until)}", cell.source, re.M))
        notebook.cells = notebook.cells[: last + 1]
    client = NotebookClient(notebook, timeout=3600, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}})
    try:
        client.execute()
    finally:
        nbformat.write(notebook, folder / path.name)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: Any) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def images(cell: Any) -> list[str]:
    """The kinds of pictures that a cell shows."""
    return [kind for output in cell.outputs for kind in output.get("data", {}) if kind.startswith("image/")]
