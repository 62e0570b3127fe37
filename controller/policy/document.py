"""YAML text as plain values, each with the line it stands in. What YAML allows and a policy should not have is a fault: keys given twice,
anchors, tags. Numbers are read as YAML 1.2 does, so `8:30`, `on` and `2024-01-01` are text. Asked by `parse`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from flexpert.controller.policy.checks import Path

MAX_CHARS = 256 * 1024
_INT = re.compile(r"[-+]?[0-9]{1,30}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
_WORDS |= {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False", "FALSE")}
_WORDS |= {".nan": float("nan"), ".inf": float("inf"), "-.inf": float("-inf")}
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    for name in ("null", "bool", "int", "float", "str", "map", "seq", "timestamp", "merge", "value")
}


@dataclass(frozen=True)
class Fault:
    line: int
    path: Path
    what: str
    todo: str


@dataclass
class Document:
    """values: None where the text could not be read. lines: of each key and each item of a list."""

    values: Any = None
    lines: dict[Path, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    readable: bool = True

    def line_of(self, path: Path) -> int:
        """Its own line, or that of the nearest thing around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_document(text: str) -> Document:
    """Never raises: what is wrong is in `faults`."""
    document = Document()
    if len(text) > MAX_CHARS:
        return _unreadable(document, 1, f"{len(text):,} characters", f"a policy has at most {MAX_CHARS:,}")
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            document.values = _Walk(document).value(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        return _unreadable(document, mark.line + 1 if mark else 1, *_why(error))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        return _unreadable(
            document, line, f"has the character U+{_code(error.character):04X}, which YAML forbids", "remove it"
        )
    except RecursionError:
        return _unreadable(document, 1, "is nested too deeply", "a policy has at most eight levels")
    return document


def _unreadable(document: Document, line: int, what: str, todo: str) -> Document:
    document.values, document.readable = None, False
    document.faults.append(Fault(line, (), what, todo))
    return document


def _code(character: object) -> int:
    return character if isinstance(character, int) else ord(str(character))


def _why(error: yaml.MarkedYAMLError) -> tuple[str, str]:
    problem = error.problem or "not readable"
    if "'\\t'" in problem:
        return "not YAML: a tab", "indent with spaces"
    if "single document" in (error.context or ""):
        return "a second document begins here", "write one policy in a file, without a line of ---"
    return f"not YAML: {problem}", "check indentation, quotes, colons and brackets here and in the line before"


class _Walk:
    """Makes values of nodes and notes their lines."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._seen: set[int] = set()

    def value(self, node: yaml.Node, path: Path) -> Any:
        line = self._document.lines.setdefault(path, node.start_mark.line + 1)
        if node.tag not in _TAGS:
            self._fault(line, path, f"has the tag {node.tag}", "remove it, values need none")
        if id(node) in self._seen:
            self._fault(line, path, "repeats another part by an alias (*)", "write it out, a policy has no anchors")
            return None
        self._seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(line, path, "has a key that is no name", "write key: value")
                continue
            key = str(key_node.value)
            here = (*path, key)
            if key in values:
                self._fault(
                    line, here, f"given twice, first in line {self._document.lines[here]}", "keep one of the two"
                )
                continue
            self._document.lines[here] = line
            values[key] = self.value(value_node, here)
        return values

    def _fault(self, line: int, path: Path, what: str, todo: str) -> None:
        self._document.faults.append(Fault(line, path, what, todo))


def _scalar(node: yaml.Node) -> Any:
    text = str(node.value)
    if getattr(node, "style", None) is not None:
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
