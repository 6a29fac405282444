"""The command line."""

from lightning_danns.cli.main import CLI, command, main

__all__ = ["CLI", "command", "main"]
