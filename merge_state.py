"""Merge initial states, where RWKV-PEFT once had this script."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("merge", methods=("state",))
