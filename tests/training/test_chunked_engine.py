"""Long contexts in one process: steps under DeepSpeed, and what a run begins with."""

from functools import cache

import pytest
import torch
from helpers.contexts import long_batch, trainable
from helpers.support import relative_error, small_model, whole_state

from finchtune import distributed
from finchtune.adapters import adapter_state
from finchtune.config import TrainConfig
from finchtune.training.engine import Engine
from finchtune.training.setup import choose_trained, start_from_data

CPU = torch.device("cpu")
STRATEGIES = ("_1", "_2", "_3", "_2_offload", "_3_offload")


@pytest.fixture(scope="module", autouse=True)
def process_group():
    distributed.init_process_group(CPU)
    yield
    distributed.shutdown()


def engine(model, **changes) -> Engine:
    return Engine(model, TrainConfig(load_model="m", data_file="d", lr_init=1e-3, **changes), CPU)


def steps(running, count=2, micro=("rows", "packed")):
    """(loss, norm of the gradient) of steps over the same micro batches, and what is learnt."""
    results = [running.step([long_batch(kind) for kind in micro], 1e-3) for _ in range(count)]
    trained = whole_state(running)["trained"]
    evaluated = running.evaluate(OneBatch(), 1)
    running.close()
    return [(r.loss, r.grad_norm) for r in results], trained, evaluated


class OneBatch:
    def every_row(self, *_):
        return [long_batch("rows")]

    def rows(self, *_):
        return [long_batch("rows"), long_batch("packed")]


def test_lora_ga_starts_from_the_gradient_of_whole_contexts():
    """Read in chunks: the same start, but for the free signs of singular vectors."""
    starts = []
    for changes in ({}, {"train_type": ["infctx"], "chunk_ctx": 13}):
        config = TrainConfig(peft="lora_ga", lora_r=2, lora_ga_batches=2, **changes)
        model = small_model()
        choose_trained(model, config, init=False)
        start_from_data(model, config, OneBatch(), CPU)
        starts.append(adapter_state(model))
    for key, tensor in starts[0].items():
        assert tensor.any()
        torch.testing.assert_close(starts[1][key].abs(), tensor.abs(), rtol=1e-3, atol=1e-4)


@cache
def whole_steps(trained, micro=("rows", "packed"), generation=6):
    """`steps` with whole contexts, under the first stage: stages are compared in test_engine.py."""
    model = trainable(trained, generation=generation)
    running = engine(model, accumulate_grad_batches=len(micro))
    return steps(running, len(micro), micro)


CASES = [(6, one, trained) for one in STRATEGIES for trained in ("all", "bone", "bone+state")]


@pytest.mark.parametrize(
    ("generation", "strategy", "trained"),
    [*CASES, (7, "_1", "all"), (7, "_3", "bone+state"), (7, "_2_offload", "bone")],
)
def test_chunks_train_as_the_whole_context_does(generation, strategy, trained):
    common = {"strategy": f"deepspeed_stage{strategy}", "accumulate_grad_batches": 2}
    model = trainable(trained, generation=generation)
    found = steps(engine(model, train_type=["infctx"], chunk_ctx=13, **common))
    expected = whole_steps(trained, generation=generation)
    for mine, plain in zip(found[0], expected[0], strict=True):
        assert mine == pytest.approx(plain, rel=1e-4)
    for name, tensor in expected[1].items():
        assert relative_error(found[1][name], tensor) < 2e-3, name
    assert found[2] == pytest.approx(expected[2], rel=1e-4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_in_bf16(strategy):
    common = {"strategy": f"deepspeed_stage{strategy}"}
    batch = ("rows",)
    model = trainable("bone", torch.bfloat16)
    chunked = engine(model, train_type=["infctx"], chunk_ctx=16, infctx_offload=True, **common)
    found, expected = steps(chunked, 1, batch), whole_steps("bone", batch)
    assert found[0][0] == pytest.approx(expected[0][0], rel=0.02)


@pytest.mark.parametrize("grad_cp", [0, 1, 2])
def test_recomputation_changes_no_bit(grad_cp):
    common = {"train_type": ["infctx"], "chunk_ctx": 16}
    found = steps(engine(trainable("bone", grad_checkpoint=grad_cp), **common), micro=("rows",))
    expected = steps(engine(trainable("bone"), **common), micro=("rows",))
    assert found[0] == expected[0]


def test_truncated_steps_learn_otherwise():
    common = {"train_type": ["infctx"], "chunk_ctx": 13}
    exact = steps(engine(trainable("bone"), **common), micro=("rows",))[0]
    truncated = steps(engine(trainable("bone"), bptt="truncated", **common), micro=("rows",))[0]
    assert truncated[0][0] == pytest.approx(exact[0][0], rel=1e-5), "the loss is the same"
    assert truncated[0][1] != pytest.approx(exact[0][1], rel=1e-3), "its gradient is not"
