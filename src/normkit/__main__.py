"""Lets ``python -m normkit`` stand for ``normkit``."""

import sys

from normkit_program import main

if __name__ == "__main__":
    sys.exit(main())
