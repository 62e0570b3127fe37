"""What a user installs: wheel and sdist hold real files and all of them, and every way of installing imports.

The environments made here take their dependencies from the one that runs the tests (a .pth line), so nothing is
downloaded; flexpert itself is always the one just installed.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

DATA_FOLDERS = ("workers/builtin_model/", "loadtest/excerpts/", "simulator/profiles/", "kernels/moe/plans/")


@pytest.fixture(scope="module")
def checkout(repository: Path, source_files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source files alone, so that neither build output nor caches of the checkout reach a build."""
    target = tmp_path_factory.mktemp("checkout")
    for file in source_files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / file, target / file, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def dist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sdist and the wheel built from it."""
    target = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", target, checkout])
    return target


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An empty environment that sees the test environment's packages, but not its flexpert."""
    run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"])
    paths = sysconfig.get_paths(vars={"base": str(tmp_path / "venv"), "platbase": str(tmp_path / "venv")})
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    others |= {path for path in sys.path if path.endswith("site-packages")}
    Path(paths["purelib"], "dependencies.pth").write_text("\n".join(sorted(others)) + "\n")
    return tmp_path / "venv"


def run(command: list[str | Path], *, cwd: Path | None = None) -> str:
    """Standard output of a command that must succeed; PYTHONPATH is not handed on, so it imports what is installed."""
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, f"{command} ended with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def packaged_files(source_files: list[Path], repository: Path) -> set[str]:
    """What must stand below flexpert/ in a wheel, from what stands in the repository."""
    linked = {link.name for link in (repository / "src" / "flexpert").iterdir() if link.is_symlink()}
    names = {file.as_posix() for file in source_files if file.parts[0] in linked}
    wanted = {name for name in names if name.endswith(".py") or name.startswith(DATA_FOLDERS)}
    return wanted | {"__init__.py", "py.typed"}


def test_every_folder_is_linked_into_the_import_package(repository: Path) -> None:
    folders = {path.parent.name for path in repository.glob("*/__init__.py")} - {"tests"}
    links = {path.name: os.readlink(path) for path in (repository / "src" / "flexpert").iterdir() if path.is_symlink()}

    assert links == {name: f"../../{name}" for name in folders}


def test_wheel_holds_every_module_and_the_data_files(dist: Path, repository: Path, source_files: list[Path]) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        members = archive.infolist()
    held = {member.filename.removeprefix("flexpert/") for member in members if member.filename.startswith("flexpert/")}

    assert held == packaged_files(source_files, repository)
    assert {member.filename.split("/")[0] for member in members} == {
        "flexpert",
        f"{wheel.name.split('-py3')[0]}.dist-info",
    }
    assert not [member.filename for member in members if stat.S_ISLNK(member.external_attr >> 16)]


def test_wheel_carries_licence_and_command(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        info = {
            name.split(".dist-info/")[1]: archive.read(name) for name in archive.namelist() if ".dist-info/" in name
        }

    assert b"Apache License" in info["licenses/LICENSE"]
    assert b"flexpert = flexpert.cli:main" in info["entry_points.txt"]


def test_sdist_holds_real_files(dist: Path, repository: Path, source_files: list[Path]) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        links = [member.name for member in archive if member.issym() or member.islnk()]
        names = {member.name.partition("/src/flexpert/")[2] for member in archive if member.isfile()}

    assert not links
    assert packaged_files(source_files, repository) <= names


@pytest.mark.slow
@pytest.mark.parametrize("installer", ["pip wheel", "pip editable", "uv", "uv editable"])
def test_installed_package_imports_and_its_command_runs(installer: str, checkout: Path, dist: Path, venv: Path) -> None:
    python = venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index"]
    uv = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "install",
        "-q",
        "--python",
        python,
        "--no-deps",
        "--offline",
        "--no-cache",
    ]
    commands = {
        "pip wheel": [*pip, *dist.glob("*.whl")],
        "pip editable": [*pip, "--no-build-isolation", "-e", checkout],
        "uv": [*uv, "--no-build-isolation", checkout],
        "uv editable": [*uv, "--no-build-isolation", "-e", checkout],
    }
    run(commands[installer])

    program = "import flexpert.hbm, flexpert.workers.messages, flexpert.controller; print(flexpert.hbm.__file__)"
    imported = Path(run([python, "-c", program], cwd=venv).strip()).resolve()
    home = checkout if "editable" in installer else venv
    assert imported.is_relative_to(home.resolve())
    assert "up" in run([venv / "bin" / "flexpert", "--help"], cwd=venv)


@pytest.mark.slow
def test_new_file_of_an_editable_install_is_importable_at_once(checkout: Path, venv: Path) -> None:
    python = venv / "bin" / "python"
    options = ["-q", "--no-deps", "--no-index", "--no-build-isolation"]
    run([sys.executable, "-m", "pip", "--python", python, "install", *options, "-e", checkout])
    planted = checkout / "workers" / "planted_later.py"
    planted.write_text('"""Planted."""\n')
    try:
        run([python, "-c", "import flexpert.workers.planted_later"], cwd=venv)
    finally:
        planted.unlink()


def test_constraints_meet_what_the_project_asks_for(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    asked = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]])
    lines = (repository / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    versions = {canonicalize_name(name): Version(version) for name, version in pinned.items()}

    for requirement in asked:
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"constraints.txt pins no version of {requirement.name}"
        assert version in requirement.specifier, (
            f"constraints.txt pins {requirement.name} {version}, asked: {requirement}"
        )
    assert not [name for name, version in versions.items() if version.local], "a local version cannot be had everywhere"


@pytest.mark.parametrize(("package", "version"), [("torch", "2.11.0"), ("transformers", "5.17.0")])
def test_lower_bounds_admit_the_gpu_machines(repository: Path, package: str, version: str) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    (asked,) = (each for each in map(Requirement, project["dependencies"]) if each.name == package)

    assert Version(version) in asked.specifier
    assert Version("3.11") in Requirement(f"python{project['requires-python']}").specifier
