"""The tools that run the tests: the suite runner's counts, and the check that no test leaves a process behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Only the plugin that the runner itself asks for: each of these runs is a pytest of its own.
QUICK = {"FLEXPERT_TEST_GRACE_S": "0.2", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"}


@pytest.fixture
def project(repository: Path, tmp_path: Path) -> Path:
    """A project of its own with our runner and our conftest."""
    (tmp_path / "tests").mkdir()
    for name in ("run_suites.py", "conftest.py"):
        shutil.copy(repository / "tests" / name, tmp_path / "tests")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -p no:cacheprovider\n")
    return tmp_path


def write_suite(project: Path, name: str, text: str) -> None:
    path = project / "tests" / name / f"test_{name}.py"
    path.parent.mkdir()
    path.write_text(text)


def run_suites(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "tests/run_suites.py", *arguments],
        cwd=project, env=os.environ | QUICK, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def is_running(pid: int) -> bool:
    """False also for one that has ended and that nobody has waited for."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def test_suites_run_in_layer_order_and_close_with_the_counts(project: Path) -> None:
    write_suite(project, "workers", "def test_one(): pass\ndef test_two(): pass\n")
    write_suite(project, "hbm", "import pytest\ndef test_one(): pass\ndef test_two(): pytest.skip('not here')\n")

    result = run_suites(project, "hbm", "workers")

    assert result.returncode == 0, result.stdout
    assert result.stdout.index("== hbm") < result.stdout.index("== workers")
    assert result.stdout.splitlines()[-1] == "3 passed, 0 failed, 1 skipped"


def test_failure_error_and_crash_each_fail_the_run(project: Path) -> None:
    write_suite(project, "hbm", "def test_one(): assert False\ndef test_two(): pass\n")
    write_suite(project, "loadtest", "def test_one(missing_fixture): pass\n")
    for name in ("workers", "examples"):  # the one is spread over processes, the other is not
        write_suite(project, name, "import os\ndef test_one(): os._exit(3)\n")
    (project / "tests" / "test_root.py").write_text("def test_one(): pass\n")

    result = run_suites(project)

    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "2 passed, 4 failed, 0 skipped"
    assert "crashed while running" in result.stdout
    assert "pytest ended with code 3" in result.stdout


def test_suite_without_tests_is_a_failure(project: Path) -> None:
    write_suite(project, "hbm", "")

    result = run_suites(project, "hbm")

    assert result.returncode == 1


def test_unknown_suite_is_named_with_those_there_are(project: Path) -> None:
    write_suite(project, "hbm", "def test_one(): pass\n")

    result = run_suites(project, "hmb")

    assert result.returncode == 2
    assert "no suite hmb; there are repository, hbm" in result.stderr


def test_process_left_behind_fails_its_suite_and_is_ended(project: Path) -> None:
    program = f"""
import subprocess
def test_leaves_a_daemon():
    daemon = subprocess.Popen(["sleep", "600"], start_new_session=True)
    open({str(project / "pid")!r}, "w").write(str(daemon.pid))
"""
    write_suite(project, "hbm", program)

    result = run_suites(project, "hbm")

    pid = int((project / "pid").read_text())
    left = is_running(pid)
    if left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert result.returncode == 1
    assert "outlived the tests" in result.stdout
