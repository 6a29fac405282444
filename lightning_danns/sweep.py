"""Search of settings: ``python -m lightning_danns.sweep --help``."""

from lightning_danns.study import command

if __name__ == "__main__":
    raise SystemExit(command("search"))
