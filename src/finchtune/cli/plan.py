"""What a training run will take of memory, steps, tokens and disk, estimated without running it."""

from finchtune.cli import train


def main(arguments: list[str] | None = None) -> int:
    """The flags are those of training."""
    return train.main([*(arguments or []), "--plan", "1"])
