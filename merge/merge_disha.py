"""Merge a Bone or Bat adapter, as RWKV-PEFT's script of this name."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("merge", methods=("bone", "bat"))
