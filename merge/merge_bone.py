"""Merge a Bone or Bat adapter into its base model's weights."""

from finchtune.errors import run_cli
from finchtune.merge_commands import merge_main

if __name__ == "__main__":
    run_cli(lambda: merge_main(("bone", "bat")))
