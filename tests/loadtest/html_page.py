"""Reads a report as a browser would: every element closed, no reference to anything outside the page, and the text that is seen."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}
REFERENCES = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "background"}


class Page(HTMLParser):
    """tables: rows of cells; references: (element, attribute, value); texts: what is seen."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.open: list[str] = []
        self.elements: list[str] = []
        self.ids: list[str] = []
        self.references: list[tuple[str, str, str]] = []
        self.styles = ""
        self.texts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._begin(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._begin(tag, attrs)

    def _begin(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        for name, value in attrs:
            assert "://" not in (value or ""), f"{tag} names an address in {name}"
            assert not name.startswith("on"), f"{tag} runs a script: {name}"
            if name == "id":
                self.ids.append(value or "")
            if name in REFERENCES:
                self.references.append((tag, name, value or ""))
            if name == "style":
                self.styles += f"{value};"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}, line {self.getpos()[0]}"
        self.open.pop()

    def handle_decl(self, decl: str) -> None:
        assert decl == "DOCTYPE html", f"a second document: {decl}"

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"no HTML: <?{data}>")

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.styles += data
            return
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def row(self, first: str) -> list[str]:
        """The first row of a table that begins with this cell."""
        return next(row for table in self.tables for row in table if row and row[0] == first)


def assert_stands_alone(page: Page) -> None:
    """Nothing is fetched, nothing is run."""
    assert page.elements[:2] == ["html", "head"]
    assert not {"script", "link", "iframe", "img", "object", "embed", "image", "base", "foreignobject"} & set(
        page.elements
    )
    assert {value[:1] for _, _, value in page.references} <= {"#"}, "references lead to parts of the page"
    assert "@import" not in page.styles
    assert set(re.findall(r"url\((.)", page.html)) <= {"#"}
    assert len(page.ids) == len(set(page.ids)), "each id once"
    inside = set(page.ids)
    assert {value[1:] for _, _, value in page.references} <= inside
    assert set(re.findall(r"url\(#([^)]+)\)", page.html)) <= inside
