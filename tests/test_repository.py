"""What a reader of the repository relies on: links that lead somewhere, files of a readable size, no traces of a machine."""

from __future__ import annotations

import ast
import importlib
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import pytest

MAX_LINES = 400
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".sh", ".json", ".cfg"}
# Data a model or a saved run brings along is not prose or code of ours.
DATA_FOLDERS = ("workers/builtin_model/", "benchmarks/results/", "tests/examples/data/")
PACKAGES = [
    "flexpert.cli", "flexpert.controller", "flexpert.dashboard", "flexpert.expert_cache", "flexpert.hbm", "flexpert.kernels",
    "flexpert.loadtest", "flexpert.simulator", "flexpert.workers",
]  # fmt: skip


@pytest.fixture(scope="module")
def texts(repository: Path, source_files: list[Path]) -> dict[str, str]:
    """Path -> content of every file of prose, code or configuration."""
    wanted = [
        file for file in source_files
        if (file.suffix in TEXT_SUFFIXES or file.name in {"Makefile", "run", "LICENSE"}) and (repository / file).is_file()
    ]  # fmt: skip
    own = [file for file in wanted if not file.as_posix().startswith(DATA_FOLDERS)]
    return {file.as_posix(): (repository / file).read_text() for file in own}


def test_every_link_of_the_documentation_resolves(repository: Path, texts: dict[str, str]) -> None:
    broken = [
        f"{name}: {target}"
        for name, text in texts.items()
        if name.endswith(".md") and not name.endswith("_template.md")  # a template's links are those of what it becomes
        for target in links_of(text)
        if not resolves(repository, repository / name, target, text)
    ]

    assert not broken


def links_of(markdown: str) -> Iterator[str]:
    prose = re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"`[^`\n]*`", "", prose)
    for match in re.finditer(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|^\[[^\]]+\]:\s*(\S+)", prose, re.MULTILINE):
        target = match.group(1) or match.group(2)
        if not re.match(r"[a-z][a-z0-9+.-]*:", target):
            yield target


def resolves(repository: Path, page: Path, target: str, text: str) -> bool:
    """Does the file exist inside the repository, and the heading in it where one is named?"""
    file_name, _, anchor = target.partition("#")
    file = (page.parent / file_name).resolve() if file_name else page
    if not file.exists() or not file.is_relative_to(repository):
        return False
    if not anchor or file.suffix != ".md":
        return True
    headings = re.findall(r"^#+\s+(.*)$", file.read_text() if file_name else text, re.MULTILINE)
    return anchor in {slug(heading) for heading in headings}


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    kept = [char for char in heading.lower() if char in " -_" or unicodedata.category(char)[0] in "LN"]
    return "".join(kept).strip().replace(" ", "-")


def test_every_package_has_its_page(repository: Path) -> None:
    folders = [name.removeprefix("flexpert.") for name in PACKAGES] + ["benchmarks", "manifests"]
    missing = [name for name in folders if not (repository / "docs" / f"{name}.md").is_file()]

    assert not missing


def test_index_names_every_page(repository: Path) -> None:
    index = (repository / "docs" / "index.md").read_text()
    pages = [page.relative_to(repository / "docs").as_posix() for page in (repository / "docs").rglob("*.md")]

    assert not [page for page in pages if page != "index.md" and f"({page})" not in index]


def test_every_test_that_a_page_names_exists(repository: Path, texts: dict[str, str]) -> None:
    named = {
        (name, match.group(1), match.group(2))
        for name, text in texts.items()
        if name.endswith(".md")
        for match in re.finditer(r"`(tests/[\w/.]+\.py)(?:::(\w+))?`", text)
    }
    missing = [
        f"{page}: {file}::{test}"
        for page, file, test in sorted(named, key=str)
        if not (repository / file).is_file() or (test and f"def {test}(" not in (repository / file).read_text())
    ]

    assert named
    assert not missing


def test_readme_names_only_targets_that_exist(repository: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (repository / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for page in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        named |= set(re.findall(r"(?:^\s*|`)make ([a-z][a-z-]*)", (repository / page).read_text(), re.MULTILINE))

    assert named
    assert named <= targets


def test_no_text_tells_of_a_machine_or_an_open_promise(texts: dict[str, str]) -> None:
    # Spelled in halves, so that this file passes its own test.
    machine = r"(?<![\w.])/(?:wo" + r"rk|ro" + r"ot|ho" + r"me|opt/(?:wheels|py" + r"pi))/\w"
    promise = r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b"
    registry = r"py" + r"pi\.org|python" + r"hosted|registry\." + r"npmjs"
    pattern = re.compile(f"{machine}|{promise}|{registry}")
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if pattern.search(line)
    ]

    assert not found


def test_no_file_outgrows_one_concept(texts: dict[str, str]) -> None:
    code = {name: text.count("\n") for name, text in texts.items() if name.endswith(".py") and name[:6] != "tests/"}
    long = {name: lines for name, lines in code.items() if lines > MAX_LINES}

    assert not long, f"more than {MAX_LINES} lines: {long}"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_states_its_public_names(package: str) -> None:
    module = importlib.import_module(package)
    assert module.__file__ is not None
    bound = public_names(ast.parse(Path(module.__file__).read_text()))

    assert len(module.__all__) == len(set(module.__all__)), "each name once"
    assert bound <= set(module.__all__), "public, but not in __all__"
    assert not [name for name in module.__all__ if not hasattr(module, name)], "in __all__, but not there"


def public_names(tree: ast.Module) -> set[str]:
    """What a package's __init__ defines or takes over from flexpert's modules, under a name without underscore."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flexpert"):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in names if not name.startswith("_")}
