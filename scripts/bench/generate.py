"""How fast text is written here: batches against one text at a time by the `rwkv` package.

    python scripts/bench/generate.py                          # a random model, L12 C768 V65536
    python scripts/bench/generate.py --model FILE.pth --prompt 32 --tokens 300 --batch 1

Tokens a second are those written over the whole time, the reading of prompts included; greedy, in
fp32 on the CPU. The package and each batch size alternate, so that a busy machine slows all
alike; medians over the rounds. The first text of each batch is compared with the package's.
"""

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_models import add_generation, sizes_of, stirred

from finchtune.errors import run_cli
from finchtune.inference.generate import generate_batch
from finchtune.models.generations import generation_of_sizes
from finchtune.weights.base import load_model
from finchtune.weights.tensors import write_tensors


def add_size_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a random model, and of the texts that are written."""
    add_generation(parser)
    parser.add_argument("--n_layer", type=int, default=12)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=65536)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=40, help="tokens to write")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)


def package_greedy(runtime: Any, prompt: list[int], n_tokens: int) -> list[int]:
    """The `rwkv` package's greedy text."""
    tokens: list[int] = []
    logits, state = runtime.forward(list(prompt), None)
    while True:
        tokens.append(int(logits.argmax()))
        if len(tokens) == n_tokens:
            return tokens
        logits, state = runtime.forward(tokens[-1:], state)


def timed(work: Callable[[], list]) -> tuple[float, list]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def compare(path: Path, given: argparse.Namespace) -> None:
    """Time all alternately and print a table."""
    model = load_model(path, torch.float32).eval()
    # Which generation the package reads is decided as it is imported.
    os.environ["RWKV_V7_ON"] = str(int(generation_of_sizes(model.config).number == 7))
    from rwkv.model import RWKV as Package

    with contextlib.redirect_stdout(None):  # it lists every tensor
        package = Package(model=str(path).removesuffix(".pth"), strategy="cpu fp32")
    draw = torch.Generator().manual_seed(2)
    size = (max(given.batch), given.prompt)
    prompts = torch.randint(1, model.config.vocab_size, size, generator=draw).tolist()

    def write(batch: int) -> list[list[int]]:
        return generate_batch(model, prompts[:batch], given.tokens, stop_tokens=())

    names = ["rwkv package", *(f"batch {batch}" for batch in given.batch)]
    forms = [lambda: [package_greedy(package, prompts[0], given.tokens)]]
    forms += [lambda batch=batch: write(batch) for batch in given.batch]
    speeds: dict[str, list[float]] = {name: [] for name in names}
    same: dict[str, bool] = {}
    for round_ in range(given.rounds + 1):
        expected = None
        for name, form in zip(names, forms, strict=True):
            seconds, texts = timed(form)
            expected = expected or texts[0]
            same[name] = texts[0] == expected
            if round_ > 0:  # the first warms up
                speeds[name].append(sum(map(len, texts)) / seconds)
    base = statistics.median(speeds[names[0]])
    print(f"{'':14} tokens/s (range)          times  first text")
    for name, found in speeds.items():
        median = statistics.median(found)
        spread = f"({min(found):.1f} to {max(found):.1f})"
        print(
            f"{name:14} {median:8.1f} {spread:20} {median / base:5.2f}  "
            f"{'the same' if same[name] else 'DIFFERS'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="a .pth instead of a random model")
    add_size_flags(parser)
    given = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"torch {torch.__version__}, {threads} threads; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        path = given.model or Path(folder, "random.pth")
        if not given.model:
            sizes = sizes_of(given.generation, given.n_layer, given.n_embd, given.vocab_size)
            write_tensors(stirred(sizes).state_dict(), path)
        compare(path, given)


if __name__ == "__main__":
    run_cli(main)
