"""Long contexts in chunks: memory and speed by length.

`speed` takes steps over one row, plain checkpointed training at the first length and chunks at all
of them in turn, Bone, one thread: tokens per second of processor time, and the time of a token as a
multiple of plain training's (median, least, most). `memory` gives the peak of a process for each
length.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from random_models import add_generation, initialised, sizes_of

from finchtune.adapters import attach
from finchtune.data.batch import padded
from finchtune.data.chunks import cut
from finchtune.data.sampling import Segment
from finchtune.training.chunked import exact_backward, own_calls, truncated_backward


def step(model, batch, chunk: int, exact: bool = True) -> float:
    """Forward and backward of a micro batch's mean loss; whole where `chunk` is 0."""
    targets = int((batch.labels != -100).sum())
    read, lose = own_calls(model)

    def backward(loss, added):
        (loss / targets + added).backward()

    if not chunk:
        loss = lose(batch, None)[0]
        backward(loss, 0.0)
    elif exact:
        loss = exact_backward(read, lose, cut(batch, chunk), backward)
    else:
        loss = truncated_backward(lose, cut(batch, chunk), backward)
    return loss.item() / targets


def made(given: argparse.Namespace, length: int, chunk: int):
    """A model, and a row of `length` tokens; plain training always recomputes whole blocks."""
    sizes = sizes_of(given.generation, given.layers, given.channels, 4096)
    model = initialised(sizes, given.grad_cp if chunk else 1)
    attach(model, "bone", r=64)
    ids = torch.randint(0, 4096, (length + 1,)).numpy()
    return model, padded([Segment(ids, None, 0)], length)


def measure(given: argparse.Namespace) -> None:
    """Print one line of JSON: tokens/s and the process's peak memory."""
    model, batch = made(given, given.length, given.chunk)
    idle = peak()
    step(model, made(given, 64, given.chunk)[1], given.chunk)
    best = float("inf")
    for _ in range(given.repeats):
        began = time.perf_counter()
        step(model, batch, given.chunk)
        best = min(best, time.perf_counter() - began)
    result = {"length": given.length, "chunk": given.chunk}
    result |= {"tokens_per_s": round(given.length / best), "peak_mib": round(peak())}
    print(json.dumps(result | {"idle_mib": round(idle)}), flush=True)


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def memory(given: argparse.Namespace) -> None:
    common = ["--layers", given.layers, "--channels", given.channels, "--repeats", given.repeats]
    common += ["--generation", given.generation, "--grad_cp", given.grad_cp]
    for length, size in [(given.lengths[0], 0), *((n, given.chunk) for n in given.lengths)]:
        words = ["one", "--length", length, "--chunk", size, *common]
        subprocess.run([sys.executable, __file__, *map(str, words)], check=True)


def speed(given: argparse.Namespace) -> None:
    """Print, for each length, how a token's processor time compares with that of plain steps."""
    torch.set_num_threads(1)
    ways = [(given.lengths[0], 0), *((n, given.chunk) for n in given.lengths)]
    runs = [(chunk, *made(given, length, chunk)) for length, chunk in ways]
    rounds = []
    for _ in range(given.repeats + 1):  # the first warms up
        rounds.append([])
        for chunk, model, batch in runs:
            began = time.process_time()
            step(model, batch, chunk)
            rounds[-1].append((time.process_time() - began) / batch.tokens.numel())
    for (length, chunk), costs in zip(ways, zip(*rounds[1:], strict=True), strict=True):
        ratios = [cost / plain[0] for cost, plain in zip(costs, rounds[1:], strict=True)]
        result = {"length": length, "chunk": chunk, "tokens_per_s": round(1 / min(costs))}
        spread = [round(f(ratios), 3) for f in (statistics.median, min, max)]
        print(json.dumps(result | {"to_plain": spread}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["memory", "speed", "one"])
    add_generation(parser)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**n for n in range(11, 17)])
    parser.add_argument("--length", type=int, help="of one measurement")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--grad_cp", type=int, default=0, help="beside chunks")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if given.what == "one":
        measure(given)
    elif given.what == "memory":
        memory(given)
    else:
        speed(given)


if __name__ == "__main__":
    main()
