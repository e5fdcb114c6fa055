"""Put trained initial states into their base model's file."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("merge", methods=("state",))
