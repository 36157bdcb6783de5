"""`python -m pnc` is the `pnc` command; `accelerate launch -m pnc clone ...` runs it in several processes."""

from pnc.cli.app import main

main()
