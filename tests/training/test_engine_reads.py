"""How often a step waits for its device: once, when it reads its results."""

import pytest
import torch
from helpers.support import small_model
from torch.utils._python_dispatch import TorchDispatchMode

from finchtune import distributed
from finchtune.adapters import attach
from finchtune.config import TrainConfig
from finchtune.data import Batch
from finchtune.training.engine import Engine

CPU = torch.device("cpu")


class Waits(TorchDispatchMode):
    """Counts the reads of single values, for each of which a GPU would be waited."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_reads_no_value_but_all_at_its_end(stage, monkeypatch):
    """Its own reads are of labels, on a CPU always; DeepSpeed's two say whether to skip."""
    distributed.init_process_group(CPU)
    model = attach(small_model(), "bone", r=8)
    config = TrainConfig(load_model="m", data_file="d", strategy=f"deepspeed_stage_{stage}")
    engine = Engine(model, config, CPU)
    tokens = torch.randint(0, 256, (2, 17))
    batch = Batch(tokens[:, :-1], tokens[:, 1:])
    engine.step([batch], 1e-2)
    in_all, deepspeeds, step = Waits(), Waits(), engine.ds.step

    def counted():
        with deepspeeds:
            step()

    monkeypatch.setattr(engine.ds, "step", counted)
    with in_all:
        engine.step([batch], 1e-2)
    engine.close()
    distributed.shutdown()
    assert len(deepspeeds.reads) <= 2
    assert in_all.reads == [torch.int64, *deepspeeds.reads]
