"""Blocks by recorded forward and backward: equal to recomputation to the last bit.

Recorded by a tape of operators, which keeps to what a CUDA graph demands; the graphs themselves are
held to the same by test_graphed_blocks_gpu.py.
"""

import itertools

import pytest
import torch
from helpers.contexts import gradients
from helpers.elementwise_emulator import cuda_kernels_in_place
from helpers.support import every_generation, small_model
from helpers.tape import TapeRecorder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from finchtune.adapters import attach
from finchtune.errors import UserError
from finchtune.models import graphed_blocks
from finchtune.models.graphed_blocks import GraphedBlocks
from finchtune.models.recurrent import NormedBlock
from finchtune.ops.kernels import cpu_standing_for

LAYERS = 3
METHODS = {
    "all": None,
    "bone": {"method": "bone", "r": 8},
    "bat": {"method": "bat", "r": 8, "mode": "row"},
    "lora, dropout": {"method": "lora", "r": 4, "dropout": 0.3},
    "bone on nf4": {"method": "bone", "r": 8, "quant": "nf4"},
    "bone on fp8_compute": {
        "method": "bone",
        "r": 8,
        "quant": "fp8_compute",
        "targets": r"blocks\.\d+\.att\.key",
    },
    "dora": {"method": "dora", "r": 4},
    "one linear": {"method": "bone", "r": 8, "targets": r"blocks\.\d+\.ffn\.key"},
    "one block": {"method": "bone", "r": 8},
    "states": None,
}
every_method = pytest.mark.parametrize("method", METHODS)


def trained_model(method, generation=6, dtype=torch.float32):
    model = small_model(n_layer=LAYERS, generation=generation)
    if METHODS[method]:
        torch.manual_seed(1)
        attach(model, **METHODS[method])
    if method == "states":
        model.requires_grad_(False).add_initial_state()
    if method == "one block":
        for parameter in model.blocks[0].parameters():
            parameter.requires_grad_(False)
    model.grad_checkpoint = 1
    return model.to(dtype).train()


def graphed(model):
    model.graphs = GraphedBlocks(TapeRecorder())
    return model


def replays(model):
    return model.graphs.record.replays


def rows_of(n, length=24):
    generator = torch.Generator().manual_seed(n)
    return torch.randint(256, (2, length), generator=generator)


def micro_batch(model, tokens):
    """A forward and a backward; the loss."""
    loss = model.loss(tokens, tokens)[0]
    loss.backward()
    return loss.detach()


def assert_same_gradients(model, reference):
    expected = gradients(reference)
    assert any(d is not None for d in expected.values())
    for name, found in gradients(model).items():
        if expected[name] is None:
            assert found is None, name
        else:
            assert torch.equal(found, expected[name]), name


def pair(*arguments):
    return graphed(trained_model(*arguments)), trained_model(*arguments)


@every_method
@every_generation
def test_steps_have_the_same_bits(method, generation):
    """Two micro batches a step, whose gradients add up, and weights that are written in place."""
    models = pair(method, generation)
    states = []
    for model in models:
        optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1e-4)
        losses = []
        for step in range(3):
            torch.manual_seed(step)
            losses += [micro_batch(model, rows_of(2 * step + i)) for i in range(2)]
            if step < 2:
                optimizer.step()
                optimizer.zero_grad()
        states.append((losses, torch.get_rng_state()))
    (losses, random), (expected, random_expected) = states
    assert losses == expected
    assert torch.equal(random, random_expected)
    assert_same_gradients(*models)
    blocks = LAYERS - (method == "one block")
    assert replays(models[0]) == 5 * 2 * blocks


def test_bf16_has_the_same_bits():
    models = pair("bone", 6, torch.bfloat16)
    for step in range(3):
        losses = [micro_batch(model, rows_of(step)) for model in models]
        assert losses[0] == losses[1]
    assert_same_gradients(*models)
    assert replays(models[0]) == 2 * 2 * LAYERS


SLOW = pytest.mark.slow  # the norms are emulated


@pytest.mark.parametrize(
    "method", ["bone", *(pytest.param(m, marks=SLOW) for m in ("all", "bat", "lora, dropout"))]
)
@every_generation
def test_the_ways_of_a_gpu_wait_for_no_value(method, generation, kernels):
    """Which operators it takes, as far as a CPU has them too; a tape refuses those that wait."""
    models = pair(method, generation, torch.bfloat16)
    for model in models:
        torch.manual_seed(0)
        with cuda_kernels_in_place("norm.cu"), cpu_standing_for("cuda"):
            for step in range(3):
                micro_batch(model, rows_of(step))
    assert_same_gradients(*models)
    assert replays(models[0]) == 2 * 2 * LAYERS


def test_gradients_arrive_at_hooks_as_tensors_of_their_own():
    """DeepSpeed's hooks take what they are given, and autograd keeps it as .grad."""
    model = graphed(trained_model("bone"))
    arrived = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: arrived.append(p.grad))
    for step in range(3):
        arrived.clear()
        micro_batch(model, rows_of(step))
        model.zero_grad()
    assert len(arrived) == len(gradients(model))
    assert len({d.data_ptr() for d in arrived}) == len(arrived)
    buffers = {x.data_ptr() for x in model.graphs.buffers.made.values()}
    assert not buffers & {d.data_ptr() for d in arrived}


def test_two_forwards_may_come_before_their_backwards():
    models = pair("lora, dropout")
    for model in models:
        torch.manual_seed(5)
        for step in range(2):
            micro_batch(model, rows_of(step))
        one, other = (model.loss(rows_of(n), rows_of(n))[0] for n in (7, 8))
        one.backward()
        other.backward()
    assert_same_gradients(*models)
    assert replays(models[0]) == 2 * LAYERS + 4 * LAYERS


def test_shapes_are_recorded_when_they_come_again_and_at_most_so_many(monkeypatch):
    monkeypatch.setattr(graphed_blocks, "MOST_SHAPES", 2)
    models = pair("bone")
    recorder = models[0].graphs.record
    for n, length in enumerate((8, 9, 10, 9, 8, 10, 9, 10)):
        losses = [micro_batch(model, rows_of(n, length)) for model in models]
        assert losses[0] == losses[1]
    assert_same_gradients(*models)
    assert len(recorder.tapes) == 2 * 2 * LAYERS
    assert recorder.replays == 3 * 2 * LAYERS


def packed(model, tokens):
    bounds = torch.tensor([0, 10, tokens.shape[1]], dtype=torch.int32)
    return model.loss(tokens[:1], tokens[:1], bounds)[0]


def continued(model, tokens):
    with torch.no_grad():
        _, state = model.hidden(tokens)
    return model.loss(tokens, tokens, state=state)[0]


def under_autocast(model, tokens):
    with torch.autocast("cpu", torch.bfloat16):
        return model.loss(tokens, tokens)[0]


def validating(model, tokens):
    with torch.no_grad():
        return model.loss(tokens, tokens)[0]


def evaluating(model, tokens):
    loss = model.eval().loss(tokens, tokens)[0]
    model.train()
    return loss


@pytest.mark.parametrize("use", [packed, continued, under_autocast, validating, evaluating])
def test_other_uses_run_without_graphs(use):
    models = pair("bone")
    for n in range(3):
        found, expected = (use(model, rows_of(n)) for model in models)
        assert torch.equal(found, expected)
    assert not models[0].graphs.record.tapes


@every_generation
def test_a_gradient_of_the_new_state_is_not_lost(generation):
    models = pair("lora, dropout", generation)
    for model in models:
        for step in range(3):
            torch.manual_seed(step)
            loss, state = model.loss(rows_of(step), rows_of(step))
            if step == 2:
                loss = loss + sum((x.float() ** 2).sum() for one in state for x in one)
            loss.backward()
    assert_same_gradients(*models)


def test_weights_that_moved_are_recorded_anew():
    models = pair("bone")
    for step in range(4):
        losses = [micro_batch(model, rows_of(step)) for model in models]
        assert losses[0] == losses[1]
        if step == 2:
            for model in models:
                for parameter in model.parameters():
                    parameter.data = 1.01 * parameter.data
    assert_same_gradients(*models)
    assert len(models[0].graphs.record.tapes) == 2 * 2 * LAYERS


class Reads(NormedBlock):
    """A block that looks at a value."""

    def __init__(self):
        super().__init__(nn.Identity(), nn.Identity(), 8, 1)

    def forward(self, x, state, cu_seqlens):
        _, y = self.ln1(x)
        return y * y.sum().item(), ()


def test_work_that_waits_for_the_device_is_refused():
    blocks, block = GraphedBlocks(TapeRecorder()), Reads()
    x = torch.randn(2, 3, 8)
    blocks(block, x, None, None)
    with pytest.raises(UserError, match=r"`cuda_graphs`: a block could not be recorded"):
        blocks(block, x, None, None)


def test_the_tape_forgets_what_is_not_copied_out():
    """The stand-in is as strict as it says."""
    x, w = torch.ones(3), torch.ones(3)
    made = []
    replay = TapeRecorder()(lambda: made.append(x * 2 + w))
    replay()
    assert made[-1].isnan().all()
    w.data = torch.zeros(3)
    with pytest.raises(AssertionError, match="moved"):
        replay()


def test_every_output_of_many_shapes_is_right():
    for length, batch in itertools.product((1, 17), (1, 3)):
        models = pair("all")
        for _ in range(2):
            tokens = torch.randint(256, (batch, length))
            outputs = [model.hidden(tokens) for model in models]
        for (found, state), (expected, state_expected) in itertools.pairwise(outputs):
            assert torch.equal(found, expected)
            for one, other in zip(state, state_expected, strict=True):
                assert all(map(torch.equal, one, other))


class Calls(TorchDispatchMode):
    """Counts calls of operators that are neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.count += not (func.is_view or "empty" in name or "detach" in name)
        return func(*args, **(kwargs or {}))


def nothing_again(work):
    """Records, and replays nothing: what is counted is what remains beside replays."""
    work()
    return lambda: None


def calls_of_a_step(n_layer):
    model = attach(small_model(n_layer=n_layer), "bone", r=8)
    model.graphs, model.grad_checkpoint = GraphedBlocks(nothing_again), 1
    for step in range(2):
        micro_batch(model, rows_of(step))
        model.zero_grad()
    with Calls() as calls:
        micro_batch(model, rows_of(2))
    return calls.count


def test_few_calls_are_left_beside_the_two_replays_of_a_block():
    """56 without graphs (tests/ops/test_operator_calls.py)."""
    assert calls_of_a_step(3) - calls_of_a_step(2) <= 5
