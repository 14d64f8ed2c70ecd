"""What the command `normkit` starts: the program, once its libraries are imported.

It is no part of the package, whose import takes the second in which an interrupt would end in a
traceback.
"""

import signal


def main() -> int:
    """Import the program, which takes a while, and run it.

    Returns:
        Its exit code. An interrupt while it is imported ends the process at once.
    """
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from normkit.cli import main as run  # noqa: PLC0415 - after the line before

    signal.signal(signal.SIGINT, handler)
    return run()
