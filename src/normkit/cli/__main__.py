"""Lets ``python -m normkit.cli`` stand for ``normkit``."""

import sys

from normkit.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
