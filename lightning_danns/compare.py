"""Several configs over several seeds: ``python -m lightning_danns.compare --help``."""

from lightning_danns.study import command

if __name__ == "__main__":
    raise SystemExit(command("comparison"))
