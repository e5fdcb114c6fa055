"""One of several processes that train with recorded blocks, and without."""

import sys

import torch
from helpers.support import small_model, whole_state
from helpers.tape import TapeRecorder

from finchtune import distributed
from finchtune.adapters import attach
from finchtune.config import TrainConfig
from finchtune.data import Batch
from finchtune.models.graphed_blocks import GraphedBlocks
from finchtune.training.engine import Engine

CPU = torch.device("cpu")


def outcome(graphs, stage):
    """What three steps report, and the weights and moments after them."""
    model = attach(small_model(), "lora", r=4, dropout=0.2)
    model.grad_checkpoint = 1
    config = TrainConfig(
        peft="lora", strategy=f"deepspeed_stage_{stage}", accumulate_grad_batches=2
    )
    engine = Engine(model, config, CPU)
    model.graphs = GraphedBlocks(TapeRecorder()) if graphs else None
    results = []
    for step in range(3):
        torch.manual_seed(2 * step + distributed.rank())
        micro = [Batch(*torch.randint(256, (2, 2, 24))) for _ in range(2)]
        results.append(engine.step(micro, 1e-2))
    state = whole_state(engine)
    engine.close()
    return [vars(result) for result in results], {k: state[k] for k in ("trained", "exp_avg_sq")}


def main():
    distributed.init_process_group(CPU)
    found = [[outcome(graphs, stage) for graphs in (True, False)] for stage in (1, 2)]
    if distributed.rank() == 0:
        torch.save(found, sys.argv[1])
    distributed.shutdown()


if __name__ == "__main__":
    main()
