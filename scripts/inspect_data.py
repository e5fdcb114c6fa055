"""Check a .bin/.idx pair completely and show what is in it."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("inspect")
