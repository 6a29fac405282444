"""``python -m lightning_danns.report RUNS``: tables and figures of all runs below a folder."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_danns.errors import UsageError


def main(args: Sequence[str] | None = None) -> None:
    """Write the report.

    Raises:
        SystemExit: with status 2 and a line of text, for a user's mistake.
    """
    parser = argparse.ArgumentParser("python -m lightning_danns.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders; every run below them is read")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: RUNS/report)")
    parser.add_argument("--last", type=int, default=5, metavar="EPOCHS", help="errors are means of these (default: 5)")
    parser.add_argument("--distributions", type=Path, metavar="RUN", help="draw weights and activity of this run")
    given = parser.parse_args(args)
    try:
        if given.last < 1:
            raise UsageError(f"--last {given.last}: it must be at least 1")
        # not before: it needs pandas and matplotlib, and says so
        from lightning_danns.report import write_report

        print(write_report(given.runs, given.out or given.runs[0] / "report", given.last, given.distributions))
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
