# PYTHON_ARGCOMPLETE_OK
"""Runs the command line: ``python -m graphreg``."""

import sys

from graphreg.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
