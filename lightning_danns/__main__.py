"""``python -m lightning_danns``: the command line."""

from lightning_danns.cli import main

if __name__ == "__main__":
    main()
