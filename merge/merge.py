"""Merge an adapter of any method into its base model's weights."""

from finchtune.errors import run_cli
from finchtune.merge_commands import merge_main

if __name__ == "__main__":
    run_cli(merge_main)
