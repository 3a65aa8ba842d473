"""Faults in numbers: ``python -m tests.faults [--kills 200] [--operations bake,extract] [--seed N] [--only NAME…]``.

Inputs are small but real, and lie in a temporary folder. After whatever happened every input has to be as it was, and
no file may have an output's name that is not whole and equal to an undisturbed run's, byte for byte; what was
interrupted is gone on with, or cleaned up, and nothing may lie beside the output then. Exit status 1 if any of that
did not hold.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import campaign, inputs
from tests.faults.campaign import Row
from tests.faults.stage import Stage

_SHOWN = 3  # broken promises of one row
_WIDTHS = "{:<18}  {:<13}  {:>5}  {:>5}  {:>6}"


def main() -> int:
    """The program; returns its exit status."""
    given = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # mounts and folders go with it
    started = time.monotonic()
    print(_WIDTHS.format("scenario", "operation", "runs", "held", "failed"))
    with Stage(Path(tempfile.mkdtemp(prefix="loratools-faults-")), getattr(inputs, given.size)) as stage:
        found = []
        for row in campaign.rows(
            stage, given.only, given.operations, kills=given.kills, seed=given.seed, least=given.least
        ):
            found.append(row)
            _show(row)
    runs, failed = sum(row.runs for row in found), sum(row.failed for row in found)
    print(_WIDTHS.format("all", "", runs, runs - failed, failed), f" in {time.monotonic() - started:,.0f} s")
    return 1 if failed else 0


def _show(row: Row) -> None:
    if row.skipped:
        print(f"{row.scenario:<18}  {row.operation:<13}  skipped: {row.skipped}", flush=True)
        return
    told = _WIDTHS.format(row.scenario, row.operation, row.runs, row.runs - row.failed, row.failed)
    print(told, flush=True)
    for promise in row.broken[:_SHOWN]:
        print(f"    {promise.strip()}")
    if row.broken[_SHOWN:]:
        print(f"    and {len(row.broken) - _SHOWN} more")


def _arguments() -> argparse.Namespace:
    listed = "\n".join(f"  {each.name:<18} {each.summary}" for each in campaign.SCENARIOS)
    parser = argparse.ArgumentParser(
        "python -m tests.faults",
        description=__doc__,
        epilog=f"scenarios:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--kills", type=int, default=200, help="how often each is killed; others in proportion"
    )
    parser.add_argument("--least", type=int, default=4, help="runs of each scenario and operation")
    parser.add_argument("--operations", default="", help="bake,extract,merge,resize")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these scenarios")
    parser.add_argument("--size", choices=("SMALL", "USUAL"), default="USUAL", help="of the inputs")
    given = parser.parse_args()
    try:
        given.only = campaign.named(given.only)
        given.operations = campaign.operations_of(list(filter(None, given.operations.split(","))))
    except ValueError as error:
        parser.error(str(error))
    return given


if __name__ == "__main__":
    sys.exit(main())
