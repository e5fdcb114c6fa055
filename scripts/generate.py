"""Continue a prompt with a model, streaming."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("generate")
