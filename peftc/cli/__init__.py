"""The command line: one file a command; `main` is where errors become exit codes."""

from __future__ import annotations

from peftc.cli.main import main as main
