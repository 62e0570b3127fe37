"""Runs the test suites one after another and tells what each took.

A suite is a folder of tests/ or, under the name `repository`, the test files that stand in tests/ itself. Each runs in
a pytest of its own, so that one suite's Ray cluster, daemons and loaded models never reach the next. Suites that keep
one core busy are spread over several processes, file by file; those that start whole clusters have the machine to themselves.
Called by `make test`; `python tests/run_suites.py hbm workers -- -k name` runs some of them and passes the rest on to
pytest (`-n 0` there keeps everything in one process, as a debugger wants it).
The closing table counts what pytest reported; a suite that crashed or collected nothing counts as a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parent
# The order of the layers: a fault low down is reported before everything above it fails too.
ORDER = (
    "repository", "loadtest", "hbm", "kernels", "expert_cache", "workers", "controller", "simulator", "dashboard", "cli",
)  # fmt: skip
SPREAD = {"repository", "loadtest", "hbm", "kernels", "expert_cache", "workers", "controller", "simulator", "cli"}
MAX_PROCESSES = 4
PYTEST_NO_TESTS = 5


@dataclass(frozen=True)
class Outcome:
    """What one suite did. failed counts errors, and 1 for a suite that ended without saying why."""

    suite: str
    passed: int
    failed: int
    skipped: int
    seconds: float
    remark: str = ""


def find_suites() -> dict[str, list[Path]]:
    """Suite name -> what pytest is given, lowest layer first; those without a place in ORDER come last."""
    suites = {"repository": sorted(TESTS.glob("test_*.py"))}
    for folder in sorted(path for path in TESTS.iterdir() if path.is_dir()):
        if any(folder.rglob("test_*.py")):
            suites[folder.name] = [folder]
    return dict(sorted(suites.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER)))


def run_suite(name: str, paths: list[Path], pytest_args: list[str]) -> Outcome:
    """Run one suite in its own pytest process; its output goes to ours as it comes."""
    print(f"\n== {name}", flush=True)
    with tempfile.TemporaryDirectory(prefix="flexpert-suite-") as scratch:
        report = Path(scratch, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "--durations=5", "--durations-min=5", f"--junitxml={report}"]
        processes = min(MAX_PROCESSES, len(os.sched_getaffinity(0)))
        if name in SPREAD and processes > 1:
            command += ["-n", str(processes), "--dist", "loadfile", "--max-worker-restart", "0"]
        started = time.monotonic()
        code = subprocess.run([*command, *pytest_args, *map(str, paths)], check=False, cwd=TESTS.parent).returncode
        seconds = time.monotonic() - started
        passed, failed, skipped = read_counts(report)
    if code == PYTEST_NO_TESTS and pytest_args:  # a -k or -m that names nothing here
        return Outcome(name, passed, failed, skipped, seconds, "nothing selected")
    if code != 0 and failed == 0:
        return Outcome(name, passed, 1, skipped, seconds, f"pytest ended with code {code}")
    return Outcome(name, passed, failed, skipped, seconds)


def read_counts(report: Path) -> tuple[int, int, int]:
    """(passed, failed, skipped) of a JUnit report; zeros where the suite died before it wrote one."""
    if not report.is_file():
        return 0, 0, 0
    counts = [0, 0, 0]
    for suite in ElementTree.parse(report).getroot().iter("testsuite"):
        tests, failures, errors, skipped = (
            int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")
        )
        counts[0] += max(0, tests - failures - errors - skipped)
        counts[1] += failures + errors
        counts[2] += skipped
    return counts[0], counts[1], counts[2]


def main(arguments: list[str]) -> int:
    names, pytest_args = arguments, []
    if "--" in arguments:
        at = arguments.index("--")
        names, pytest_args = arguments[:at], arguments[at + 1 :]
    suites = find_suites()
    if unknown := [name for name in names if name not in suites]:
        print(f"no suite {', '.join(unknown)}; there are {', '.join(suites)}", file=sys.stderr)
        return 2
    outcomes = [run_suite(name, suites[name], pytest_args) for name in names or suites]

    print(f"\n{'suite':<14}{'passed':>8}{'failed':>8}{'skipped':>9}{'time':>10}")
    for outcome in outcomes:
        counts = f"{outcome.passed:>8}{outcome.failed:>8}{outcome.skipped:>9}{outcome.seconds:>8.1f} s"
        print(f"{outcome.suite:<14}{counts}  {outcome.remark}".rstrip())
    passed, failed, skipped = (sum(getattr(o, key) for o in outcomes) for key in ("passed", "failed", "skipped"))
    print(f"{'all':<14}{passed:>8}{failed:>8}{skipped:>9}{sum(o.seconds for o in outcomes):>8.1f} s\n")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
