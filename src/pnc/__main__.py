"""`python -m pnc` is the `pnc` command; `accelerate launch -m pnc clone ...` runs it in several processes."""

import os
import sys

INTERRUPTED = 130


def main() -> None:
    """Load the command line and run it; torch takes seconds to load, and whoever stops it meanwhile sees one line."""
    try:
        from pnc.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("pnc: stopped\n")
        sys.stderr.flush()
        os._exit(INTERRUPTED)  # sys.exit would end in SIGINT if the interrupt came while Python ran a string of code


if __name__ == "__main__":
    main()
