"""The command line: parse, call, format."""

from normkit.cli.app import main

__all__ = ["main"]
