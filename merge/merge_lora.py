"""Merge a LoRA adapter into its base model's weights."""

from finchtune.cli.merge import merge_main
from finchtune.errors import run_cli

if __name__ == "__main__":
    run_cli(lambda: merge_main(("lora",)))
