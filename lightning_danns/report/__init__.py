"""From run folders to tables and figures: ``python -m lightning_danns.report RUNS``, or as pandas DataFrames.

    runs = load_runs("results")     a row for each run and epoch
    table(runs)                     a row for each data set and arm

Rooms: `runs` reads, `tables` averages, `figures` and `distributions` draw. They need the extra ``study`` (pandas,
matplotlib), so names load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_danns.report.runs import load_runs as load_runs
    from lightning_danns.report.tables import table as table

__all__ = ["load_runs", "table"]
_ROOM_OF = {"load_runs": "runs", "table": "tables"}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
