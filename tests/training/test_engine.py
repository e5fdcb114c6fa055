"""DeepSpeed's step against a plain torch loop, and its whole state out and in, in one process."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from helpers.support import every_generation, small_model, whole_state
from torch import nn

from finchtune import distributed
from finchtune.adapters import attach
from finchtune.config import TrainConfig
from finchtune.data import Batch
from finchtune.data.batch import packed, padded
from finchtune.data.sampling import Segment
from finchtune.training.engine import Engine

CPU = torch.device("cpu")
METHODS = {
    "bone": {"r": 8},
    "bat": {"r": 8, "mode": "row"},
    "lora": {"r": 4},
    "pissa": {"r": 4},
}


@pytest.fixture(scope="module", autouse=True)
def process_group():
    distributed.init_process_group(CPU)
    yield
    distributed.shutdown()


def settings(**changes) -> TrainConfig:
    return TrainConfig(load_model="m", data_file="d", micro_bsz=2, lr_init=1e-2, **changes)


def batches(n_steps, accumulate=1):
    generator = torch.Generator().manual_seed(0)
    steps = []
    for _ in range(n_steps):
        micro = []
        for length in range(10, 10 + accumulate):
            tokens, labels = torch.randint(0, 256, (2, 2, length), generator=generator)
            labels[0, : length // 2] = -100
            micro.append(Batch(tokens, labels))
        steps.append(micro)
    return steps


def run(engine, steps, lr=1e-2):
    return [engine.step(micro, lr) for micro in steps]


def plain_torch_losses(model, steps, clip, lr=1e-2):
    """What the engine should do, said plainly."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.99), eps=1e-8, weight_decay=0)
    losses, norms = [], []
    for micro in steps:
        valid = sum((batch.labels != -100).sum() for batch in micro)
        loss = sum(model.loss(*batch)[0] for batch in micro) / valid
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(trainable, clip).item())
        optimizer.step()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("peft", ["none", "bone"])
@every_generation
def test_equals_a_plain_loop(stage, peft, generation):
    def model():
        made = small_model(generation=generation)
        return made if peft == "none" else attach(made, "bone", r=8)

    steps = batches(1, accumulate=3) * 5
    config = settings(strategy=f"deepspeed_stage_{stage}", accumulate_grad_batches=3, grad_clip=0.5)
    engine = Engine(model(), config, CPU)
    results = run(engine, steps)
    losses, norms = plain_torch_losses(model(), steps, clip=0.5)
    assert [r.loss for r in results] == pytest.approx(losses, rel=3e-5)
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-3)
    assert losses[-1] < losses[0]
    engine.close()


@pytest.mark.parametrize("stage", [1, 3])
def test_means_of_micro_batches_are_averaged(stage):
    model = small_model()
    reference = small_model()
    (micro,) = batches(1, accumulate=3)
    config = settings(strategy=f"deepspeed_stage_{stage}", accumulate_grad_batches=3, grad_clip=0)
    engine = Engine(model, dataclasses.replace(config, loss_mean="micro_batches"), CPU)
    result = engine.step(micro, 1e-2)
    engine.close()
    loss = sum(reference.loss(*batch)[0] / (batch.labels != -100).sum() for batch in micro) / 3
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
    assert math.isclose(result.loss, loss.item(), rel_tol=1e-5)
    assert math.isclose(result.grad_norm, norm.item(), rel_tol=1e-4)


@pytest.mark.parametrize(
    "strategy", ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3",
                 "deepspeed_stage_2_offload", "deepspeed_stage_3_offload"],
)  # fmt: skip
def test_under_bf16_there_are_fp32_master_weights(strategy):
    """Updates far below bf16's resolution add up."""
    model = attach(small_model().bfloat16(), "bone", r=8).bfloat16()
    engine = Engine(model, settings(strategy=strategy, peft="bone", grad_clip=0), CPU)
    name, parameter = next(iter(engine.trained.items()))
    before = engine.full_parameter(parameter)
    assert before.dtype == torch.float32
    steps = batches(4)
    for micro in steps:
        engine.step(micro, 1e-5)
    after = engine.full_parameter(parameter)
    moved = (after - before).abs()
    assert 0 < moved.max() <= 4.5e-5
    assert not torch.equal(after, after.bfloat16().float()), f"{name} was rounded to bf16"
    engine.close()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_add_up_in_fp32(stage):
    """Sixteen times the same micro batch has the gradient of one, and moves the weights as one.

    Adding up in bf16 would be wrong by some 1e-2: each sum is rounded to 8 bits.
    """
    (micro,) = batches(1)
    norms, weights = [], []
    for count in (1, 16):
        config = settings(strategy=f"deepspeed_stage_{stage}", accumulate_grad_batches=count)
        engine = Engine(attach(small_model().bfloat16(), "bone", r=8), config, CPU)
        norms.append(engine.step(micro * count, 1e-2).grad_norm)
        weights.append(whole_state(engine)["trained"])
        engine.close()
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], rtol=1e-6), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_method_learns_and_leaves_the_base_alone(method, dtype):
    base = small_model().to(dtype)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    engine = Engine(attach(base, method, **METHODS[method]), settings(), CPU)
    (micro,) = batches(1)
    results = run(engine, [micro] * 15)
    assert results[-1].loss < 0.8 * results[0].loss
    after = base.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    engine.close()


STRATEGIES = ["_1", "_2", "_3", "_2_offload", "_3_offload"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_out_and_in_exactly(strategy, dtype):
    """LoRA+ has two parameter groups."""
    config = settings(strategy=f"deepspeed_stage{strategy}", lora_plus_ratio=4.0)
    steps = batches(6)

    def start(trained=None):
        model = attach(small_model().to(dtype), "lora", r=4)
        for name, tensor in (trained or {}).items():
            model.state_dict()[name].copy_(tensor)
        return Engine(model, config, CPU)

    whole = start()
    run(whole, steps[:3])
    state = whole_state(whole)
    losses = [r.loss for r in run(whole, steps[3:])]
    again = start(state["trained"])
    again.load_state(state)
    assert [r.loss for r in run(again, steps[3:])] == losses
    one, other = whole_state(whole), whole_state(again)
    for part in ("trained", "exp_avg", "exp_avg_sq"):
        for name, tensor in one[part].items():
            assert torch.equal(tensor, other[part][name]), (part, name)
    assert other["adam_step"] == 6
    whole.close()
    again.close()


def test_packed_documents_give_the_step_of_padded_ones():
    documents = [torch.randint(0, 256, (n + 1,)) for n in (5, 12, 1, 30)]
    segments = [Segment(ids.numpy(), None, i) for i, ids in enumerate(documents)]
    results = []
    for batch in (padded(segments, 30), packed(segments)):
        engine = Engine(attach(small_model(), "bone", r=8), settings(), CPU)
        results.append([engine.step([batch], 1e-2).loss for _ in range(3)])
        engine.close()
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bad_steps_are_skipped_without_a_trace(strategy, dtype):
    """A run with bad steps ends in the state of one that never had them, first steps included."""
    good = [[b._replace(tokens=b.tokens.clamp_min(1)) for b in step] for step in batches(3, 2)]
    bad = [good[0][0], good[0][1]._replace(tokens=torch.zeros_like(good[0][1].tokens))]
    config = settings(
        strategy=f"deepspeed_stage{strategy}", accumulate_grad_batches=2, grad_clip=0.0
    )
    states = []
    for steps in (good, [bad, *good[:2], bad, good[2], bad]):
        model = attach(small_model().to(dtype), "bone", r=8)
        with torch.no_grad():
            model.emb.weight[0] = torch.inf
        engine = Engine(model, config, CPU)
        before = whole_state(engine)
        assert before["adam_step"] == 0
        results = run(engine, steps)
        assert [r.skipped for r in results] == [step is bad for step in steps]
        assert all(math.isfinite(r.loss) != r.skipped for r in results)
        states.append(whole_state(engine))
        engine.close()
    for part in ("trained", "exp_avg", "exp_avg_sq"):
        for name, tensor in states[0][part].items():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, states[1][part][name]), (part, name)
    assert states[0]["adam_step"] == states[1]["adam_step"] == 3


class Forward(nn.Module):
    """A model whose loss is infinite with a finite gradient."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *batch):
        return self.model(*batch) + torch.inf


def test_an_infinite_loss_with_a_finite_gradient_is_skipped():
    engine = Engine(attach(small_model(), "bone", r=8), settings(), CPU)
    (micro,) = batches(1)
    engine.ds.module = Forward(engine.ds.module)
    assert run(engine, [micro])[0].skipped
    engine.close()


def test_a_fully_masked_step_is_zero_and_harmless():
    engine = Engine(attach(small_model(), "bone", r=8), settings(), CPU)
    tokens = torch.zeros(2, 8, dtype=torch.long)
    result = engine.step([Batch(tokens, torch.full_like(tokens, -100))], 1e-2)
    assert result.loss == 0
    assert result.grad_norm == 0
    engine.close()


GOLDEN = Path(__file__).parent / "golden" / "bone_20_steps.json"


def test_golden_loss_curve():
    """Twenty steps of a tiny model with Bone give the recorded losses, on any machine."""
    text = "Ada has 3 apples and finds 4 more. Ben has 9 pears and sells 2. " * 8
    ids = torch.tensor(list(text.encode())).unfold(0, 33, 16)
    config = settings(accumulate_grad_batches=1, random_seed=0)
    engine = Engine(attach(small_model(n_layer=3), "bone", r=8), config, CPU)
    losses = []
    for step in range(20):
        rows = ids[[(2 * step) % len(ids), (2 * step + 1) % len(ids)]]
        losses.append(engine.step([Batch(rows[:, :-1], rows[:, 1:])], 1e-2 * 0.9**step).loss)
    engine.close()
    assert losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-5)
