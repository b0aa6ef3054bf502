"""`python -m tightrope` is the command `tightrope`."""

from tightrope.cli import main

main()
