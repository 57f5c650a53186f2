"""``python -m genie`` is the ``genie`` command."""

import sys

from genie.cli import main

if __name__ == "__main__":
    sys.exit(main())
