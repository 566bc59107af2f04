"""What comments and documents point to is there: sections of docs/spec.md, files, headings.

Each check is a pure function of texts, which is tested on a small one first: a pattern that finds nothing would pass for ever.
"""

import functools
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
from documented import DOCUMENTS, blocks, stand_ins

ROOT = Path(__file__).resolve().parents[1]
SPEC = ROOT / "docs" / "spec.md"
FOLDERS = ("mimic_video", "mimic_video_client", "data_pipelines", "configs", "launch", "tests", "benchmarks", "docs")
SUFFIXES = {".py", ".md", ".sh", ".ipynb", ".toml"}
WITH_PATHS = [path for path in DOCUMENTS if path.name not in ("CHANGELOG.md", "changelog.md")]  # which speak of the past, too

_SECTION = r"\d+(?:\.\d+)?"
_GAP = r"[\s#]"  # a citation may go on in the next line of a comment
_NEXT = rf"(?:{_GAP}*,{_GAP}*(?:and{_GAP}+)?|{_GAP}+(?:and|or|to){_GAP}+|\s?[-–]\s?)"
_CITATION = re.compile(rf"(?:\bSPEC{_GAP}+§?|§){_SECTION}(?:{_NEXT}§?{_SECTION}\b)*")
_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1[^\n]*$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_ANY = re.compile(r"<[^>]*>|\{[^}]*\}|…|(?<![A-Z])(?!README)[A-Z]{3,}")  # stands for any name: <yours>, {a,b}, NAME


def citations(text: str) -> list[tuple[int, str]]:
    """(line, section) of all that is cited as "SPEC 1.2", "SPEC 1.2, 3 and 4.5", "SPEC 1.2 to 1.4" or "§1.2".

    Of a range that is its two ends.
    """
    found = []
    for match in _CITATION.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        found += [(line, section) for section in re.findall(_SECTION, match[0])]
    return found


def headings(text: str) -> list[str]:
    """The texts of Markdown headings; a `#` in a block of code begins none."""
    return re.findall(r"^#{1,6} +(.+?) *$", _FENCE.sub("", text), re.MULTILINE)


def sections(text: str) -> set[str]:
    """The numbers that headings such as "## 3. Title" and "### 3.4 Title" begin with."""
    return {match[1] for heading in headings(text) if (match := re.match(rf"({_SECTION})\.? ", heading))}


def unknown_citations(texts: Mapping[str, str], known: set[str]) -> list[str]:
    """Citations of sections that are not known, as "file:line cites section N"."""
    return [
        f"{name}:{line} cites section {section}"
        for name, text in texts.items()
        for line, section in citations(text)
        if section not in known
    ]


def slugs(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a Markdown text."""
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings(text))
    seen: Counter[str] = Counter()
    anchors = set()
    for heading in plain:
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        anchors.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return anchors


def links(text: str) -> list[str]:
    """Targets of links and images outside of code."""
    prose = _SPAN.sub("", _FENCE.sub("", text))
    return re.findall(r"\]\(\s*<?([^)\s>]+)", prose) + re.findall(r"^\[[^\]]+\]: +<?([^\s>]+)", prose, re.MULTILINE)


@functools.cache
def _anchors(path: Path) -> set[str]:
    return slugs(path.read_text("utf-8"))


def broken_links(document: Path) -> list[str]:
    """Relative links of a Markdown file to what is not there: a file, or a heading of a Markdown file."""
    broken = []
    for link in links(document.read_text("utf-8")):
        if re.match(r"[a-z][a-z0-9+.-]*:|//", link, re.IGNORECASE):
            continue  # nothing is fetched
        target, _, anchor = urllib.parse.unquote(link).partition("#")
        path = document.parent / target if target else document
        if not path.exists():
            broken.append(f"{document.name}: {link} is no file")
        elif anchor and path.suffix == ".md" and anchor not in _anchors(path):
            broken.append(f"{document.name}: {link} is no heading")
    return broken


def quoted_paths(text: str) -> list[str]:
    """Words in backticks that begin with one of `FOLDERS`, without what names a part of a file.

    What stands for any name, as in `configs/<yours>.py` and `configs/NAME.py`, becomes a `*`.
    """
    paths = []
    for span in _SPAN.findall(_FENCE.sub("", text)):
        for word in _ANY.sub("*", span).split():
            if word.partition("/")[0] in FOLDERS and "/" in word:
                paths.append(word.partition(":")[0].rstrip(".,;"))
    return paths


def missing_paths(paths: Iterable[str], root: Path) -> list[str]:
    """Paths and patterns below `root` that nothing has; one that ends in `/` has to be a folder."""

    def exists(path: str) -> bool:
        found = root.glob(path.rstrip("/")) if set(path) & set("*?[") else [root / path]
        return any(each.is_dir() if path.endswith("/") else each.exists() for each in found)

    return [path for path in paths if not exists(path)]


def _texts() -> dict[str, str]:
    """All that may cite, but this file, whose citations are made up."""
    files = [path for path in ROOT.glob("*") if path.is_file()]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    chosen = sorted(path for path in files if path.suffix in SUFFIXES and path != Path(__file__).resolve())
    return {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in chosen}


def test_citations_are_found():
    text = """\
# SPEC 1.2: a formula, and 3.14 is a number. SPEC 6. A sentence.
(SPEC 4.2, 7); "SPEC 5, table"; see SPEC 4.3 and 4.4
SPEC §3.10, and §8; SPEC 3.4–3.6; SPEC 9.1 to 9.3.
# SPEC
# 2, and SPEC 8.2,
# 8.5: SPEC = 3; SPECIAL 7
"""
    expected = {1: ["1.2", "6"], 2: ["4.2", "7", "5", "4.3", "4.4"], 3: ["3.10", "8", "3.4", "3.6", "9.1", "9.3"]}
    expected |= {4: ["2"], 5: ["8.2", "8.5"]}
    assert citations(text) == [(line, section) for line, found in expected.items() for section in found]


def test_unknown_citations_are_listed():
    known = sections("# Title\n## 1. One\n### 1.2 Two\n```\n## 7. A comment\n```\ntext\n## 10. Ten\n")
    assert known == {"1", "1.2", "10"}
    texts = {"a.py": "x = 1  # SPEC 1.2, 1.3\n", "b.md": "SPEC 10\n\nSPEC 7, 1\n"}
    assert unknown_citations(texts, known) == ["a.py:1 cites section 1.3", "b.md:3 cites section 7"]


def test_every_cited_section_is_in_the_specification():
    texts = _texts()
    elsewhere = {name: len(citations(text)) for name, text in texts.items() if name != "docs/spec.md"}
    assert sum(elsewhere.values()) > 100  # or else they are not found
    assert not (unknown := unknown_citations(texts, sections(SPEC.read_text("utf-8")))), "\n".join(unknown)


def test_sections_are_in_order_and_there_once():
    numbers = [match[0] for heading in headings(SPEC.read_text("utf-8")) if (match := re.match(_SECTION, heading))]
    assert len(numbers) > 50
    assert numbers == sorted(set(numbers), key=lambda number: [int(part) for part in number.split(".")])


def test_slugs_are_as_githubs():
    text = "# The system\n## 1.2 A `b_c`, d/e – f!\n```bash\n# no heading\n```\n## [Link](x.md) twice\n## Link twice\n"
    assert slugs(text) == {"the-system", "12-a-b_c-de--f", "link-twice", "link-twice-1"}


def test_broken_links_are_listed(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "other.md").write_text("# A heading\n")
    document = tmp_path / "README.md"
    document.write_text("""\
# Here
[one](docs/other.md), [two](docs/other.md#a-heading "title"), [three](#here), [web](https://x.org/y#z), [![i](docs)](docs/)
`code[0](none.md)`, [four](docs/none.md), [five](docs/other.md#none), [![six](none.png)](#there)

[seven]: docs/nothing.md
""")
    assert broken_links(document) == [
        "README.md: docs/none.md is no file",
        "README.md: docs/other.md#none is no heading",
        "README.md: none.png is no file",
        "README.md: #there is no heading",
        "README.md: docs/nothing.md is no file",
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    assert not (broken := broken_links(document)), "\n".join(broken)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_merge_was_left_half_done(document):
    assert not re.findall(r"^(?:<{7}|>{7})(?: |$)", document.read_text("utf-8"), re.MULTILINE)


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_missing_paths_are_listed(tmp_path):
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "train.py").touch()
    text = """\
`launch/train.py`, `launch/`, `python launch/train.py --config=configs/x.py`, `launch/train.py:main`
`launch/<name>.py`, `launch/*.py`, `launch/tra_NAME.py`, `launch/none.py::test`, `launch/train.py/`
`configs/NAME.py`, `launch/{a,b}.sh`, `tests/README.md`, `runs/x`, `docs`
```
`launch/in_a_block.py`
```
"""
    paths = quoted_paths(text)
    missing = ["launch/tra_*.py", "launch/none.py", "launch/train.py/", "configs/*.py", "launch/*.sh", "tests/README.md"]
    assert missing_paths(paths, tmp_path) == missing
    assert len(paths) == 12


@pytest.mark.parametrize("document", WITH_PATHS, ids=lambda path: path.name)
def test_paths_that_documents_name_are_there(document):
    text = document.read_text("utf-8")
    written = stand_ins(text)  # by readers
    missing = missing_paths([path for path in quoted_paths(text) if path not in written], ROOT)
    assert not missing and not missing_paths(written.values(), ROOT), f"{document.name} names {', '.join(missing)}"


def wrong_marks(text: str, name: str, root: Path) -> list[str]:
    """Comments before blocks of bash, of a document, that say nothing to tests, or name a test that does not read it."""
    problems = []
    for block in blocks(text):
        test = re.fullmatch(r"run by (tests/\S+\.py)", block.mark)
        if not test and not re.fullmatch(r"|needs an? .+|\S+ stands for \S+", block.mark):
            problems.append(f"{name}:{block.line}: expected one of the comments of tests/documented.py, not '{block.mark}'")
        elif test and not ((root / test[1]).is_file() and name in (root / test[1]).read_text("utf-8")):
            problems.append(f"{name}:{block.line}: {test[1]} does not read {name}")
    return problems


def test_wrong_marks_are_listed(tmp_path):
    text = """\
<!-- needs a cloud -->
```bash
export A=b   # what it is
gcloud x --y=1 \\
    --z

# nothing
```
<!-- run by tests/test_x.py -->

```bash
python a.py
```
```text
no.sh
```
<!-- run by tests/test_y.py -->
```bash
b
```
words
```bash
c
```
<!-- run it -->
```bash
d
```
<!-- a.py stands for b.py -->
```bash
e
```
"""
    assert [block.commands for block in blocks(text)] == [
        ["export A=b", "gcloud x --y=1 --z"],
        ["python a.py"],
        ["b"],
        *([x] for x in "cde"),
    ]
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_x.py").write_text("commands('d.md', ...)")
    assert wrong_marks(text, "d.md", tmp_path) == [
        "d.md:18: tests/test_y.py does not read d.md",
        "d.md:26: expected one of the comments of tests/documented.py, not 'run it'",
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_comments_before_blocks_of_bash_say_something(document):
    name = str(document.relative_to(ROOT))
    assert not (wrong := wrong_marks(document.read_text("utf-8"), name, ROOT)), "\n".join(wrong)
