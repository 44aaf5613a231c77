"""The command line: ``refold export | explain | verify | refit | check | build | ...``."""

from refold.cli.main import main

__all__ = ["main"]
