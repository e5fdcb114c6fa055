"""Offer a model to programs that speak OpenAI's API."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("serve")
