"""Makes ``python -m normkit.cli`` run the program ``normkit``."""

import sys

from normkit.cli import main

if __name__ == "__main__":
    sys.exit(main())
