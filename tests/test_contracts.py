"""The rules between packages are enforced: a planted violation of each fails the linter that should see it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

PLANTED = [
    ("hbm/__init__.py", "import flexpert.workers.step", "dependencies point one way"),
    ("hbm/__init__.py", "import flexpert.kernels", "dependencies point one way"),
    ("workers/messages.py", "import flexpert.controller", "dependencies point one way"),
    ("simulator/__init__.py", "import flexpert.dashboard", "dependencies point one way"),
    ("loadtest/__init__.py", "import flexpert.hbm", "loadtest stands alone"),
    ("workers/step.py", "import time", "pure modules stay pure"),
    ("workers/step.py", "import torch", "pure modules stay pure"),
    ("hbm/ops.py", "import numpy", "pure modules stay pure"),
    ("hbm/__init__.py", "import torch", "the HBM manager starts without torch and ray"),
    ("controller/gateway/__init__.py", "import torch", "the gateway starts without torch"),
    ("controller/supervision.py", "import ray", "one module calls Ray"),
    ("controller/supervision.py", "import asyncio", "pure modules stay pure"),
]


@pytest.fixture(scope="session")
def project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())


@pytest.fixture
def writable_copy(repository: Path, tmp_path: Path) -> Path:
    """The import package with real folders in place of the links, and the configuration beside it."""
    shutil.copytree(
        repository / "src",
        tmp_path / "src",
        ignore=shutil.ignore_patterns("builtin_model", "__pycache__", "*.egg-info"),
    )
    shutil.copy(repository / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(("file", "line", "contract"), PLANTED)
def test_planted_import_breaks_its_contract(file: str, line: str, contract: str, writable_copy: Path) -> None:
    path = writable_copy / "src" / "flexpert" / file
    path.write_text(f"{path.read_text()}\n{line}\n")

    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=writable_copy, env=os.environ | {"PYTHONPATH": "src"}, capture_output=True, text=True,
    )  # fmt: skip

    assert result.returncode != 0
    assert f"{contract} BROKEN" in result.stdout, result.stdout + result.stderr


def test_bare_import_of_a_package_fails_lint(repository: Path) -> None:
    folders = sorted(link.name for link in (repository / "src" / "flexpert").iterdir() if link.is_symlink())
    planted = '"""Planted."""\n' + "".join(f"import {name}\n" for name in folders)

    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select=TID251", "--output-format=concise", "--stdin-filename=x.py", "-"],
        cwd=repository, input=planted, capture_output=True, text=True,
    )  # fmt: skip

    assert result.returncode == 1, result.stdout + result.stderr
    missed = [name for name in folders if f"`{name}` is banned" not in result.stdout]
    assert not missed, f"pyproject.toml bans no bare import of {missed}"


def test_relative_import_fails_lint(repository: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select=TID252", "--stdin-filename=workers/x.py", "-"],
        cwd=repository, input="from . import step\n", capture_output=True, text=True,
    )  # fmt: skip

    assert result.returncode == 1


def test_light_modules_load_neither_torch_nor_ray(project: dict[str, Any], repository: Path) -> None:
    """import-linter reads import statements; this also sees what a package's __init__ pulls in when it really runs."""
    contracts = {contract["name"]: contract for contract in project["tool"]["importlinter"]["contracts"]}
    light = ["flexpert", "flexpert.hbm", "flexpert.loadtest"]
    light += contracts["pure modules stay pure"]["source_modules"]
    light += contracts["the gateway starts without torch"]["source_modules"]
    program = (
        "import importlib, sys\n"
        f"for name in {light!r}:\n"
        "    importlib.import_module(name)\n"
        "    heavy = {'torch', 'transformers', 'ray'} & set(sys.modules)\n"
        "    assert not heavy, f'{name} loads {heavy}'\n"
    )

    result = subprocess.run([sys.executable, "-c", program], cwd=repository, capture_output=True, text=True)

    assert result.returncode == 0, result.stderr
