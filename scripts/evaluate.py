"""Exact match of a model's final answers on questions with known answers."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("evaluate")
