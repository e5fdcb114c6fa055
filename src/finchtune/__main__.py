"""`python -m finchtune` is the `finchtune` command."""

from finchtune.cli.main import main

main()
