"""Tokenise text into the .bin/.idx pair that `train.py --data_type binidx` reads."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("prepare")
