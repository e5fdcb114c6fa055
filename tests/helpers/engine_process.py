"""One of several processes that train together, pairs of them sharing a context."""

import os
import sys

import torch
from helpers.contexts import long_batch, trainable
from helpers.support import whole_state

from finchtune import distributed
from finchtune.config import TrainConfig
from finchtune.training.engine import Engine

CPU = torch.device("cpu")
KINDS = ("rows", "packed")
CASES = [(stage, chunked) for stage in (1, 2, 3) for chunked in (False, True)]


def outcome(case, kinds, **changes):
    """(loss, norm of the gradient) of steps over micro batches of these kinds; what is learnt."""
    stage, chunked = case
    chunks = {"train_type": ["infctx"], "chunk_ctx": 12} if chunked else {}
    running = Engine(
        trainable("bone"),
        TrainConfig(
            strategy=f"deepspeed_stage_{stage}",
            accumulate_grad_batches=len(kinds),
            **chunks,
            **changes,
        ),
        CPU,
    )
    results = [running.step([long_batch(kind) for kind in kinds], 1e-3) for _ in range(2)]
    trained = whole_state(running)["trained"]
    running.close()
    return [(r.loss, r.grad_norm) for r in results], trained


def main():
    distributed.init_process_group(CPU)
    mine = KINDS[distributed.rank() // 2]
    found = [outcome(case, [mine], context_parallel=2) for case in CASES]
    if distributed.rank() == 0:
        torch.save(found, sys.argv[1])
    distributed.shutdown()
    os._exit(0)  # as commands end: DeepSpeed holds on to gloo's threads


if __name__ == "__main__":
    main()
