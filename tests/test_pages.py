"""What Sphinx reads beside the files of docs/. Whether it builds is a stage of .ci/run."""

import dataclasses
import json
import re
import runpy
import types

import pytest
from documented import ROOT
from test_docs import headings

from mimic_video.config import ExperimentConfig, extends, field_paths, fixed, free

pages = types.SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "pages.py")))


@dataclasses.dataclass(frozen=True)
class Group:
    """What a group is."""

    size: tuple[int, int] = fixed((1, 2), "of `it`", "window latents")
    kind: str = free("a|b", "one | two")


@dataclasses.dataclass(frozen=True)
class Whole:
    """What it is.

    And more.
    """

    steps: int = extends(3, "how many")
    group: Group = Group()


def test_tables_have_every_field_with_what_is_known_about_it():
    assert (
        pages.configuration_tables(Whole)
        == """\
## The experiment

What it is.

And more.

| field | type | default | what it is | when a run goes on | presupposed by |
|---|---|---|---|---|---|
| `steps` | `int` | `3` | how many | may grow |  |

## `group`

What a group is.

| field | type | default | what it is | when a run goes on | presupposed by |
|---|---|---|---|---|---|
| `group.size` | `tuple[int, int]` | `(1, 2)` | of `it` | stays | `window`, `latents` |
| `group.kind` | `str` | `'a\\|b'` | one \\| two | may change |  |"""
    )


def test_the_page_of_the_configuration_has_every_field_once():
    text = pages.page("configuration", (ROOT / "docs" / "configuration.md").read_text("utf-8"), [])
    assert re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE) == sorted(
        field_paths(ExperimentConfig), key=lambda path: "." in path
    )
    assert "## `data`" in text and pages.FIELDS not in text


def test_links_lead_to_pages():
    text = """\
[a](docs/design.md#contracts) [b](CONTRIBUTING.md#tests) [c](configs/x.py) `[d](docs/e.md)` [f](#here) [g](https://h.org/i.md)
```bash
echo "[j](docs/k.md)"
```
![l](docs/images/m.gif), [n](launch/colab/o.ipynb) and [p](README.md)
"""
    assert (
        pages.linked(text, "")
        == """\
[a](design.md#contracts) [b](contributing.md#tests) [c](../configs/x.py) `[d](docs/e.md)` [f](#here) [g](https://h.org/i.md)
```bash
echo "[j](docs/k.md)"
```
![l](images/m.gif), [n](colab/o.ipynb) and [p](index.md)
"""
    )
    inside = "[a](design.md) [b](../CHANGELOG.md#x) [c](../configs/x.py) [d](images/e.gif) [f](../launch/colab/g.ipynb)"
    assert pages.linked(inside, "docs") == (
        "[a](design.md) [b](changelog.md#x) [c](../configs/x.py) [d](images/e.gif) [f](colab/g.ipynb)"
    )


@pytest.mark.parametrize(("page", "file"), pages.FROM_ROOT.items())
def test_pages_of_the_root_have_its_text(page, file):
    stub = (ROOT / "docs" / f"{page}.md").read_text("utf-8")
    assert f"[{file}](../{file})" in stub  # what GitHub shows
    text = pages.page(page, stub, [])
    assert headings(text) == headings((ROOT / file).read_text("utf-8")) != [] and "](docs/" not in text


def test_notebooks_are_copied_and_listed(tmp_path):
    (tmp_path / "docs" / "colab").mkdir(parents=True)
    (tmp_path / "docs" / "colab" / "gone.ipynb").touch()
    assert pages.copy_notebooks(tmp_path) == [] and pages.toctree([]) == ""
    (tmp_path / "launch" / "colab").mkdir(parents=True)
    languages = {"b": {}, "a": {"language_info": {"name": "julia", "pygments_lexer": "julia"}}}
    for name, metadata in languages.items():
        (tmp_path / "launch" / "colab" / f"{name}.ipynb").write_text(json.dumps({"cells": [name], "metadata": metadata}))
    (tmp_path / "launch" / "colab" / "c.py").touch()
    copies = pages.copy_notebooks(tmp_path)
    read = [json.loads(path.read_text()) for path in copies]
    assert [notebook["cells"] for notebook in read] == [["a"], ["b"]]
    assert [notebook["metadata"]["language_info"]["pygments_lexer"] for notebook in read] == ["julia", "ipython3"]
    assert sorted((tmp_path / "docs" / "colab").iterdir()) == copies
    listed = pages.page("index", f"# Title\n\n{pages.NOTEBOOKS}\n", copies)
    assert listed == "# Title\n\n```{toctree}\n:caption: Notebooks\n:hidden:\n\ncolab/a\ncolab/b\n```\n"


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    listed = [
        line for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", index, re.DOTALL | re.MULTILINE) for line in tree.split()
    ]
    there = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert there - set(listed) == set(), "lines that docs/index.md lacks"
    assert {name for name in listed if not name.startswith(":")} >= there
