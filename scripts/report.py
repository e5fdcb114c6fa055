"""Lay training runs side by side in one HTML page that needs no other file."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("report")
