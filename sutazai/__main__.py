"""`python -m sutazai` and the command `sutazai`."""

from __future__ import annotations

import sys

from sutazai.cli import run


def main() -> None:
    """Run the command line, and exit with its code."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
