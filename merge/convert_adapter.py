"""Convert an adapter file to the form of Hugging Face's peft, or back."""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("convert")
