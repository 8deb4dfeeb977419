"""The command ``topoprune``: demo, train, prune, compact, extract, solve, compare, solvers, doctor."""

from topoprune.cli.app import app, main

__all__ = ["app", "main"]
