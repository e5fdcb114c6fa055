"""Take an adapter off merged weights again: the base comes back, up to rounding."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("unmerge")
