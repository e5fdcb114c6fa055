"""How fast text is written with an adapter that stays unmerged, and on a quantised base.

    python scripts/bench/generate_adapters.py        # a random model, L12 C768 V65536

Tokens a second of greedy texts after a prompt, in fp32 on the CPU; all take turns, so that a busy
machine slows all alike; medians over the rounds. "plain" is the base, as fast as a merged model.
"""

import argparse
import copy
import os
import statistics
import time

import torch
from generate import add_size_flags
from random_models import sizes_of, stirred

from finchtune import attach, generate_batch

CASES = {
    "plain": None,
    "bone": {"method": "bone", "r": 64},
    "lora": {"method": "lora", "r": 32},
    "pissa": {"method": "pissa", "r": 32},
    "bat": {"method": "bat", "r": 64},
    "bone, nf4": {"method": "bone", "r": 64, "quant": "nf4"},
    "bat, nf4": {"method": "bat", "r": 64, "quant": "nf4"},
    "bone, int8": {"method": "bone", "r": 64, "quant": "int8"},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_size_flags(parser)
    given = parser.parse_args()
    sizes = sizes_of(given.generation, given.n_layer, given.n_embd, given.vocab_size)
    base = stirred(sizes).eval()
    models = {
        name: attach(copy.deepcopy(base), **case).eval() if case else base
        for name, case in CASES.items()
    }
    size = (max(given.batch), given.prompt)
    prompts = torch.randint(1, given.vocab_size, size).tolist()
    speeds: dict[tuple[int, str], list[float]] = {}
    for round_ in range(given.rounds + 1):
        for batch in given.batch:
            for name, model in models.items():
                began = time.perf_counter()
                generate_batch(model, prompts[:batch], given.tokens, stop_tokens=())
                if round_ > 0:  # the first warms up
                    speed = batch * given.tokens / (time.perf_counter() - began)
                    speeds.setdefault((batch, name), []).append(speed)
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"torch {torch.__version__}, {threads} threads; load {load:.1f}")
    print(f"{'':22} tokens/s (range)           of plain")
    for (batch, name), found in speeds.items():
        median = statistics.median(found)
        share = median / statistics.median(speeds[batch, "plain"])
        spread = f"({min(found):.1f} to {max(found):.1f})"
        print(f"{f'batch {batch}, {name}':22} {median:8.1f} {spread:20} {share:5.2f}")


if __name__ == "__main__":
    main()
