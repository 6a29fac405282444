"""Studies: search of settings, comparison of configs over seeds, and the report of both.

    settings  <-  queue  <-  {search, comparison}        settings  <-  runs  <-  tables  <-  report

Trials are Optuna's: its storage says who trains what. What came of a run is said by its folder alone.
"""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module

from lightning_danns.errors import UsageError


def command(room: str, args: Sequence[str] | None = None) -> int:
    """Run ``main`` of a room on ``args`` (default: ``sys.argv``); its exit status, or 2 after a user's mistake."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*( is experimental|experimental feature|LightningCLI's args)")  # meant
            return import_module(f"{__name__}.{room}").main(list(sys.argv[1:] if args is None else args))
    except ModuleNotFoundError as error:
        print(f'error: {error}: studies need pip install "lightning-danns[study]"', file=sys.stderr)
    except (UsageError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on", file=sys.stderr)
        return 130
    return 2
