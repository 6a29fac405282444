"""From run folders to tables and figures: ``python -m lightning_danns.report RUNS``, or as pandas DataFrames.

    runs = load_runs("results")     a row for each run and epoch
    table(runs)                     a row for each data set and arm

Rooms: `runs` (and `trials`) reads, `tables` averages, `figures` and `distributions` draw, `write` writes. They need the
extra ``study`` (pandas, matplotlib, scipy), so names load on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_danns.errors import UsageError

if TYPE_CHECKING:
    from lightning_danns.report.runs import load_runs as load_runs
    from lightning_danns.report.tables import table as table
    from lightning_danns.report.write import write_report as write_report

__all__ = ["load_runs", "table", "write_report"]
_ROOM_OF = {"load_runs": "runs", "table": "tables", "write_report": "write"}


def __getattr__(name: str) -> Any:
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
    except ImportError as error:
        if (error.name or "").split(".")[0] in ("pandas", "matplotlib", "scipy"):
            raise UsageError('reports need pandas, matplotlib and scipy: pip install -e ".[study]"') from error
        raise
