"""Tell what a file or folder of weights is."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("info")
