"""The commands of documents, for tests that check or run them.

`tests/test_documented_commands.py` checks the commands of every block of bash, in all documents: programs, flags, values,
experiments. Nothing has to be written for that. A comment before a block says what there is to say beside:

    <!-- needs a cloud -->                                          or a cluster, a robot, a network: programs that no check knows
    <!-- run by tests/launch/test_NAME.py -->                       a test that runs the block, too, and reads the document
    <!-- configs/yours.py stands for configs/quickstart.py -->      a file that readers are to write; of the whole document

What needs something is read, too: its commands of ours are checked as others are.
"""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CLOUD, CLUSTER = "needs a cloud", "needs a cluster"
DOCUMENTS = sorted(path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])

_BLOCK = re.compile(r"(?:^<!-- (?P<mark>[^\n]*?) -->\n+)?^```bash\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1[^\n]*$", re.MULTILINE | re.DOTALL)
_STANDS_FOR = re.compile(r"^<!-- (\S+) stands for (\S+) -->$", re.MULTILINE)
_KEYWORDS = {"do", "done", "else", "fi", "if", "then", "while"}


class Block(NamedTuple):
    """A block of bash: the text of the comment before it, its line in the document, and its commands."""

    mark: str
    line: int
    commands: list[str]


def blocks(text: str) -> list[Block]:
    """The blocks of bash of a Markdown text. Lines that go on are joined, and comments of the shell left out."""
    found = []
    for match in _BLOCK.finditer(text):
        lines = match["text"].replace("\\\n", " ").splitlines()
        commands = [re.sub(r"\s+#.*", "", re.sub(r" {2,}", " ", line)).strip() for line in lines]
        line = text.count("\n", 0, match.start("text"))
        found.append(Block(match["mark"] or "", line, [command for command in commands if command and command[0] != "#"]))
    return found


def commands(document: str, mark: str) -> list[str]:
    """The commands of a document, such as docs/pods.md, in blocks with that mark."""
    text = (ROOT / document).read_text("utf-8")
    return [command for block in blocks(text) if block.mark == mark for command in block.commands]


def inline_commands(text: str) -> list[str]:
    """Whole commands of ours within sentences: `python launch/...` in backticks, unless they only say what a form is ("...")."""
    spans = re.findall(r"`(python launch/[^`\n]+)`", _FENCE.sub("", text))
    return [span for span in spans if "..." not in span]


def stand_ins(text: str) -> dict[str, str]:
    """Files that a document's readers are to write, and the file of the tree that stands for each."""
    return dict(_STANDS_FOR.findall(text))


def programs(command: str) -> list[list[str]]:
    """The words of every program that a line of shell starts, without variables that are set before it and where output goes.

    Raises:
        ValueError: for quotes that do not end.
    """
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    found: list[list[str]] = [[]]
    redirected = False
    for word in lexer:
        if set(word) <= set("();|&"):
            found.append([])
        elif set(word) <= set("<>"):
            redirected = True
        elif redirected:
            redirected = False
        elif found[-1] or not (re.match(r"[A-Za-z_]\w*=", word) or word in _KEYWORDS):
            found[-1].append(word)
    return [words for words in found if words]
