"""Take an adapter off merged weights again: the base comes back, up to rounding."""

from finchtune.errors import run_cli
from finchtune.merge_commands import unmerge_main

if __name__ == "__main__":
    run_cli(unmerge_main)
