"""`python -m flexpert.cli`."""

from flexpert.cli import main

main()
