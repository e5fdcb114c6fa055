"""Write a model, or an adapter, in the form that another runtime loads."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("export")
