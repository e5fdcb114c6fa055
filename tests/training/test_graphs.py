"""DeepSpeed's steps over recorded blocks: the losses, norms and weights of those that are not."""

import dataclasses

import pytest
import torch
from helpers.support import REPOSITORY, every_generation, small_model, whole_state
from helpers.tape import TapeRecorder

from finchtune import distributed
from finchtune.adapters import attach
from finchtune.config import TrainConfig
from finchtune.config.checks import mistakes_of
from finchtune.data import Batch
from finchtune.distributed.launch import run_processes
from finchtune.errors import UserError
from finchtune.models.graphed_blocks import GraphedBlocks
from finchtune.training.engine import Engine
from finchtune.training.precision import check_device

CPU = torch.device("cpu")
STEPS, LAYERS = 4, 2


@pytest.fixture(scope="module", autouse=True)
def process_group():
    distributed.init_process_group(CPU)
    yield
    distributed.shutdown()


def outcome(graphs, config, generation=6, dtype=torch.float32):
    """What the steps report, and the state after them."""
    model = small_model(n_layer=LAYERS, generation=generation)
    torch.manual_seed(0)
    if config.peft != "none":
        attach(model, config.peft, **config.adapter_hyperparameters)
    model.to(dtype).grad_checkpoint = 1
    engine = Engine(model, config, CPU)
    model.graphs = GraphedBlocks(TapeRecorder()) if graphs else None
    results = []
    for step in range(STEPS):
        torch.manual_seed(step)
        micro = [torch.randint(256, (2, 2, 24)) for _ in range(config.accumulate_grad_batches)]
        results.append(engine.step([Batch(*pair) for pair in micro], 1e-2))
    replays = graphs and model.graphs.record.replays
    found = results, whole_state(engine), replays
    engine.close()
    assert model.graphs is None
    return found


def assert_equal(found, expected):
    assert found[0] == expected[0]
    for part in ("trained", "exp_avg", "exp_avg_sq"):
        for name, tensor in expected[1][part].items():
            assert torch.equal(found[1][part][name], tensor), (part, name)


def settings(stage, peft="bone", **changes):
    return TrainConfig(
        load_model="m", data_file="d", micro_bsz=2, peft=peft, strategy=f"deepspeed_stage_{stage}",
        bone_r=8, lora_r=4, lora_dropout=0.2, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("stage", ["1", "2", "2_offload"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_those_without_graphs(stage, accumulate, dtype):
    config = settings(stage, accumulate_grad_batches=accumulate)
    found, expected = (outcome(graphs, config, 6, dtype) for graphs in (True, False))
    assert_equal(found, expected)
    # The first micro batch runs as it is.
    assert found[2] == (STEPS * accumulate - 1) * 2 * LAYERS


@pytest.mark.parametrize("peft", ["none", "lora"])
@every_generation
def test_of_every_generation_all_weights_and_dropout(peft, generation):
    config = settings("2", peft, accumulate_grad_batches=2, grad_clip=0.1)
    assert_equal(*(outcome(graphs, config, generation) for graphs in (True, False)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": "deepspeed_stage_3"}, "deepspeed_stage_1 or 2, not 3"),
        ({"grad_cp": 0}, "`grad_cp` 1, not 0"),
        ({"train_type": ["infctx"]}, "not for infctx"),
        ({"context_parallel": 2}, "not for infctx"),
        ({"dataload": "pack"}, "not `dataload` pack"),
    ],
)
def test_what_graphs_do_not_go_with_is_refused(changes, said):
    config = settings("1", cuda_graphs=True)
    assert not list(mistakes_of(config))
    (mistake,) = mistakes_of(dataclasses.replace(config, **changes))
    assert said in mistake


def test_without_a_gpu_they_are_refused():
    with pytest.raises(UserError, match="`cuda_graphs` needs a GPU"):
        check_device(settings("1", cuda_graphs=True), CPU)


@pytest.mark.slow
def test_two_processes_take_the_steps_that_they_take_without_graphs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY / 'src'}:{REPOSITORY / 'tests'}")
    program = REPOSITORY / "tests/helpers/graphs_process.py"
    assert run_processes(2, [str(program), str(tmp_path / "found.pth")]) == 0
    for (results, state), (expected, state_expected) in torch.load(tmp_path / "found.pth"):
        assert results == expected
        for part, tensors in state_expected.items():
            for name, tensor in tensors.items():
                assert torch.equal(state[part][name], tensor), (part, name)
