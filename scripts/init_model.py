"""Write a new, untrained RWKV-6 weight file."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("init")
