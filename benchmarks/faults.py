"""Every process of a cluster killed or stopped at every step of a transition, while requests run.

    python benchmarks/faults.py                        # all cells, some ten minutes
    python benchmarks/faults.py --only "joiner / commit"

For each cell: seconds from the fault until a fresh request was answered, until nothing was in transition and a standby was warm again, and
until a later scale was done; and whether the requests that ran ended with exactly the text that the undisturbed cluster gave them.
Streams of a gateway that is killed end with it and are counted as lost, not as failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import saved_run
from elasticity import free_port
from fault_cells import Outcome, Trial, all_cells
from local_cluster import LocalCluster


def measure(trial: Trial, only: str, rows: list[dict[str, Any]]) -> list[Outcome]:
    found = []
    for cell in all_cells():
        if not re.search(only, cell.name):
            continue
        try:
            outcome = trial.run(cell)
        except Exception as error:  # the next cell may still tell something
            trial.let_go()
            print(f"{cell.name}: {type(error).__name__}: {str(error)[:1500]}", flush=True)
            rows.append({"what": cell.name, "error": str(error)[:300]})
            continue
        row = outcome.row()
        rows.append(row)
        found.append(outcome)
        print(row, *outcome.failed[:3], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells in whose name this regular expression is found")
    parser.add_argument("--model", default=None, help="a model directory; the built-in one if none is given")
    parser.add_argument("--out", type=Path, default=saved_run.RESULTS)
    parser.add_argument("--keep-log", action="store_true", help="leave the runtime directory with its logs")
    args = parser.parse_args()
    started = datetime.datetime.now(datetime.UTC)
    drills = Path(tempfile.mkdtemp(prefix="fxd-"))
    os.environ["FLEXPERT_DRILL_DIR"] = str(drills)
    options = [*([args.model] if args.model else []), "--workers", "2", "--standby", "1", "--max-workers", "3"]
    cluster = LocalCluster(*options, "--memory", "512MiB", port=free_port()).start()
    rows: list[dict[str, Any]] = []
    print("runtime", cluster.runtime, flush=True)
    try:
        trial = Trial(cluster, drills)
        try:
            outcomes = measure(trial, args.only, rows)
        finally:
            trial.close()
        restarts = int(not cluster.running)
    finally:
        cluster.stop() if args.keep_log else cluster.close()
    goals = [
        saved_run.goal("cells that were run to their end", len(outcomes), f">= {len(rows)}"),
        saved_run.goal("restarts of up", restarts, "<= 0"),
        saved_run.goal("failed requests", sum(len(outcome.failed) for outcome in outcomes), "<= 0"),
        saved_run.goal("s until a fresh request was answered, p100", max((o.served_s for o in outcomes), default=1e9), "<= 5"),
    ]  # fmt: skip
    saved_run.print_table(goals)
    path = saved_run.save("faults", device="cpu", rows=rows, goals=goals, started=started, folder=args.out)
    print("saved", path)
    raise SystemExit(0 if all(goal["met"] for goal in goals) else 1)


if __name__ == "__main__":
    main()
