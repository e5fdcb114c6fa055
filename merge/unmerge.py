"""Take an adapter off merged weights again: the base comes back, up to rounding."""

from finchtune.cli.merge import unmerge_main
from finchtune.errors import run_cli

if __name__ == "__main__":
    run_cli(unmerge_main)
