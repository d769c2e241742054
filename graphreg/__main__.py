# PYTHON_ARGCOMPLETE_OK
"""``python -m graphreg``."""

import sys

from graphreg.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
