"""Merge a PiSSA adapter into its base model's weights."""

from finchtune.errors import run_cli
from finchtune.merging import main

if __name__ == "__main__":
    run_cli(lambda: main(("pissa", "olora")))
