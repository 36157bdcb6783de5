"""`python -m pnc` is the `pnc` command; `accelerate launch -m pnc clone ...` runs it in several processes."""

import sys

INTERRUPTED = 130


def main() -> None:
    """Load the command line and run it; torch takes seconds to load, and whoever stops it meanwhile sees one line."""
    try:
        from pnc.cli.app import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("pnc: stopped\n")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
