"""`python -m lightship` is the command line."""

from lightship.cli import main

main()
