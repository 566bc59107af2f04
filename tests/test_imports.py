"""Which package imports which: the table of docs/design.md, held against the code."""

import ast
import functools
import gc
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("mimic_video", "mimic_video_client", "data_pipelines", "configs", "launch")
_NAMES = re.compile(r"`([\w.]+)`")


def allowed() -> dict[str, set[str]]:
    """Package → packages that it may import, as the table says. Names without a package are of `mimic_video`."""
    text = (ROOT / "docs" / "design.md").read_text()
    rows = re.findall(
        r"^\| (`.*?) \|(.*)\|$", text[text.index("## Which package imports which") : text.index("## Contracts")], re.M
    )
    return {whole(name): set(map(whole, _NAMES.findall(targets))) for names, targets in rows for name in _NAMES.findall(names)}


def whole(name: str) -> str:
    return name if name.partition(".")[0] in PACKAGES else f"mimic_video.{name}"


def package(module: str) -> str:
    """As the table names it."""
    first, *rest = module.split(".")
    return f"{first}.{rest[0]}" if first == "mimic_video" and rest else first


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Every module's tree. CPython up to 3.12 fails to make one if a garbage collection meanwhile runs Python code."""
    paths = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
    gc.disable()
    try:
        return {
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): ast.parse(path.read_text())
            for path in paths
        }
    finally:
        gc.enable()


def imports(tree: ast.Module, known: dict[str, ast.Module]) -> Iterator[str]:
    """Modules of this repository, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            parts = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from (parts & known.keys()) or {node.module}


def test_imports_are_found():
    known = dict.fromkeys(("a.b", "a.c", "a"))
    tree = ast.parse("import a.b\nimport json\ndef f():\n    from a import c, other\n    from a import other\n")
    assert list(imports(tree, known)) == ["a.b", "a.c", "a"]


def test_every_package_imports_only_what_the_table_allows():
    table, known = allowed(), modules()
    assert table["mimic_video.vam"] >= {"mimic_video.batch", "mimic_video.flow"}
    found: dict[str, set[str]] = {}
    for name, tree in known.items():
        found.setdefault(package(name), set()).update(package(other) for other in imports(tree, known))
    free = {"launch", "mimic_video"}  # scripts import everything; the package itself names what it offers
    assert found.keys() - free == table.keys()
    wrong = {name: others - table[name] - {name} for name, others in found.items() if name not in free}
    assert {name: others for name, others in wrong.items() if others} == {}
    unused = {name: others - found[name] for name, others in table.items()}
    assert {name: others for name, others in unused.items() if others} == {}, "the table allows what nobody does"
    assert not any("launch" in others for name, others in found.items() if name != "launch")


def test_the_table_points_downward():
    order = list(graphlib.TopologicalSorter(allowed()).static_order())  # raises CycleError
    for above, below in (("policy", "runs"), ("training", "runs"), ("analysis", "training"), ("evaluation", "policy")):
        assert order.index(f"mimic_video.{above}") > order.index(f"mimic_video.{below}")


def test_no_module_imports_itself_by_way_of_others():
    known = modules()
    graph = {name: set(imports(tree, known)) - {name, "mimic_video"} for name, tree in known.items()}
    list(graphlib.TopologicalSorter(graph).static_order())
    with pytest.raises(graphlib.CycleError):
        list(graphlib.TopologicalSorter(graph | {"mimic_video.config": {"mimic_video.vam"}}).static_order())
