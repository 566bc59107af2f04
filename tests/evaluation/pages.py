"""Reads HTML pages that tests look into."""

import base64
import io
import re
from html.parser import HTMLParser

from PIL import Image


class Page(HTMLParser):
    """The cells of every table row, all attributes, the visible text, and whether tags are balanced."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def require_self_contained(source):
    """Checks that a page is well-formed and loads nothing; gives the formats of the pictures inside."""
    page = Page(source)
    assert page.open == []
    assert not re.search(r"https?://|<script|<link|url\(|@import", source)
    assert {name for _, name, _ in page.attributes} & {"href", "srcset", "data", "background"} == set()
    formats = []
    for value in (value for _, name, value in page.attributes if name == "src"):
        kind, data = re.fullmatch(r"data:image/(\w+);base64,(.*)", value).groups()
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        image.load()
        assert image.format == kind.upper()
        formats.append(kind)
    return formats
