import re
from html.parser import HTMLParser

from ptqc.comparison.page import render


class Outline(HTMLParser):
    """Collects cells, what is referred to, and checks that elements close in order."""

    VOID = frozenset({"meta", "img", "source", "br"})

    def __init__(self):
        super().__init__()
        self.open, self.cells, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")
        self.links += [value for name, value in attributes if name in ("src", "srcset", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open:
            self.cells[-1] += data


def outline(page):
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_asks_for_nothing(comparison):
    page = render(comparison)
    links = outline(page).links
    assert len(links) == 2
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    assert not re.search(r"https?://|@import|url\(", re.sub(r"base64,[\w+/=]+", "", page))


def test_the_table_holds_every_run(comparison):
    cells = outline(render(comparison)).cells
    for run in comparison.runs:
        assert run.label in cells
        assert f"{run.evaluation.kl:.5f}" in cells
    assert "41.77" in cells


def test_every_layer_has_its_errors(comparison):
    cells = outline(render(comparison)).cells
    at = cells.index("layers.0.up")
    assert cells[at + 1 : at + 7] == ["0.100", "0.090", "0.090", "0.090", "0.400", "0.010"]


def test_names_are_escaped(comparison):
    page = render(comparison)
    assert "<odd>" not in page
    assert "layers.1.&lt;odd&gt;" in page
    assert "<title>models/&lt;reference&gt;, quantized</title>" in page


def test_both_screens_have_their_picture(comparison):
    page = render(comparison)
    assert '<source media="(prefers-color-scheme: dark)"' in page
    light, dark = outline(page).links
    assert light != dark
