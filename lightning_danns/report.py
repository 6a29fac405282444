"""Tables and figures of runs: ``python -m lightning_danns.report --help``."""

from lightning_danns.study import command

if __name__ == "__main__":
    raise SystemExit(command("report"))
