"""Talk with a model."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("chat")
