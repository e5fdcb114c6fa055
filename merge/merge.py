"""Merge an adapter of any method into its base model's weights."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("merge")
