"""From the bytes of one packaged file to plain text: one function a kind of file, chosen by name in packages.toml.

Called by corpus.py. Nothing here knows of packages, domains or licences; each function takes bytes and gives a
list of texts.
"""

import gzip
import re
import struct
import subprocess
import zlib
from collections.abc import Callable
from html.parser import HTMLParser

BLOCK_TAGS = {"p", "div", "li", "tr", "h1", "h2", "h3", "h4", "h5", "dt", "dd", "br", "table", "ul", "ol", "section"}
SILENT_TAGS = {"script", "style", "head", "nav", "header", "footer", "svg", "button", "form"}


def decoded(data: bytes) -> str:
    """The text of a file, gunzipped where needed; empty if it is not UTF-8."""
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\f", "\n")
    except UnicodeDecodeError:
        return ""


class _PlainText(HTMLParser):
    """Collects the visible text of a page; block tags break lines, <pre> keeps its spaces."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.silent = 0
        self.pre = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.silent += tag in SILENT_TAGS
        self.pre += tag == "pre"
        if tag in BLOCK_TAGS or tag == "pre":
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.silent -= tag in SILENT_TAGS and self.silent > 0
        self.pre -= tag == "pre" and self.pre > 0
        if tag in BLOCK_TAGS or tag == "pre":
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.silent:
            flowing = re.sub(r"\s+", " ", data)
            at_line_start = not self.parts or self.parts[-1].endswith("\n")
            self.parts.append(data if self.pre else flowing.lstrip() if at_line_start else flowing)


def plain(data: bytes) -> list[str]:
    return [decoded(data)]


def html(data: bytes) -> list[str]:
    parser = _PlainText()
    parser.feed(decoded(data))
    text = re.sub(r"[ \t]+\n", "\n", "".join(parser.parts).replace("\xa0", " ").replace("¶", ""))
    return [re.sub(r"\n{3,}", "\n\n", text)]


def man(data: bytes) -> list[str]:
    """A manual page as a terminal shows it, 78 columns, without overstrikes; pages that only include another are
    empty."""
    source = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    if source.lstrip().startswith(b".so "):
        return []
    command = ["groff", "-t", "-mandoc", "-Tutf8", "-P-cbou", "-rLL=78n", "-rHY=0", "-Kutf8"]
    done = subprocess.run(command, input=source, capture_output=True, timeout=60, check=False)
    text = done.stdout.decode("utf-8", "replace").replace("\u2010", "-").replace("\u2212", "-")
    text = re.sub(r"(?<=[^\s.])  (?=\S)", " ", text)  # words that groff spread to fill the line
    return [re.sub(r"\n{3,}", "\n\n", text)]


def fortune(data: bytes) -> list[str]:
    """Epigrams in groups of twelve: one alone is too short to be a document."""
    sayings = [saying.strip("\n") for saying in decoded(data).split("\n%\n")]
    return ["\n\n".join(sayings[i : i + 12]) for i in range(0, len(sayings), 12)]


def dictd(data: bytes) -> list[str]:
    """A dictd dictionary is one gzip stream (dictzip); its entries follow one another. Pieces are cut by corpus.py."""
    text = gzip.decompress(data).decode("utf-8", "replace")
    return [re.sub(r"\n{3,}", "\n\n", text.replace("\r", ""))]


def sword(index: bytes, blocks: bytes) -> list[str]:
    """A SWORD zText module: `index` has (offset, size, unpacked size) of each zlib block, 3 x uint32 little-endian."""
    texts = []
    for offset, size, _ in struct.iter_unpack("<III", index):
        osis = zlib.decompress(blocks[offset : offset + size]).decode("utf-8", "replace")
        osis = re.sub(r"<(note|title)\b.*?</\1>", "", osis, flags=re.S)
        osis = re.sub(r"<(verse|p|l|lg|div|chapter)\b[^>]*>|</(p|l|lg|div)>", "\n", osis)
        text = re.sub(r"<[^>]+>", "", osis).replace("\u00b6", "")
        texts.append(re.sub(r"\s*\n\s*", "\n", text))
    return texts


KINDS: dict[str, Callable[[bytes], list[str]]] = {
    "text": plain,
    "tar": plain,
    "html": html,
    "man": man,
    "fortune": fortune,
    "dictd": dictd,
}
