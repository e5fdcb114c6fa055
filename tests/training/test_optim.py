"""Learning-rate schedules against plain statements of them; parameter groups."""

import itertools
import math

import pytest
from helpers.support import small_model

from finchtune.adapters import attach
from finchtune.models.rwkv6 import RWKV6
from finchtune.training.optim import learning_rate, parameter_groups, set_learning_rate


def rates(schedule, total=101, warmup=0, lr_init=1e-3, lr_final=1e-4):
    return [
        learning_rate(step, total, lr_init, lr_final, schedule, warmup) for step in range(total)
    ]


@pytest.mark.parametrize("schedule", ["cos", "exp", "linear", "wsd"])
def test_schedules_run_from_first_to_last_rate(schedule):
    found = rates(schedule)
    assert found[0] == pytest.approx(1e-3)
    assert found[-1] == pytest.approx(1e-4)
    assert all(a >= b for a, b in itertools.pairwise(found))


def test_schedules_in_the_middle():
    assert rates("linear")[50] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates("cos")[50] == pytest.approx((1e-3 + 1e-4) / 2)
    assert rates("cos")[25] == pytest.approx(1e-4 + 0.9e-3 * (1 + math.cos(math.pi / 4)) / 2)
    assert rates("exp")[50] == pytest.approx(math.sqrt(1e-3 * 1e-4))
    assert rates("constant") == [1e-3] * 101


def test_wsd_is_stable_and_then_decays_in_its_last_fifth():
    found = rates("wsd")
    assert found[:81] == pytest.approx([1e-3] * 81)
    assert found[90] == pytest.approx((1e-3 + 1e-4) / 2)


def test_warmup_multiplies_and_hands_over():
    found = rates("cos", warmup=10)
    expected = [1e-3 * (0.01 + 0.99 * step / 10) for step in range(10)]
    assert found[:10] == pytest.approx(expected)
    assert found[10] == pytest.approx(1e-3)
    assert found[-1] == pytest.approx(1e-4)


def plain_rate(schedule, step, total, warmup, first, final):
    """The schedules said one by one; step 0 is the first, `total - 1` the last."""
    if step < warmup:
        return first * (0.01 + 0.99 * step / warmup)
    done = (step - warmup) / (total - 1 - warmup)
    if schedule == "linear":
        return first * (1 - done) + final * done
    if schedule == "cos":
        return (first + final) / 2 + (first - final) / 2 * math.cos(math.pi * done)
    if schedule == "exp":
        return math.exp(math.log(first) * (1 - done) + math.log(final) * done)
    if schedule == "wsd":  # stable for four fifths, then in a straight line
        return first if done <= 0.8 else first + (final - first) * (done - 0.8) / 0.2
    return first


@pytest.mark.parametrize("schedule", ["cos", "exp", "linear", "constant", "wsd"])
@pytest.mark.parametrize(
    ("total", "warmup", "final"), [(57, 0, 1e-5), (101, 10, 1e-4), (40, 7, 3e-3)]
)
def test_every_step_of_every_schedule(schedule, total, warmup, final):
    expected = [plain_rate(schedule, s, total, warmup, 1e-3, final) for s in range(total)]
    assert rates(schedule, total, warmup, 1e-3, final) == pytest.approx(expected, rel=1e-9)


def test_layerwise_rate_reaches_the_optimizer():
    model = small_model()
    groups = parameter_groups(model.named_parameters(), doubled_lr=RWKV6.doubled_lr)
    set_learning_rate(groups, 1e-3)
    decays = {id(p) for n, p in model.named_parameters() if n.endswith("att.time_decay")}
    for group in groups:
        expected = 2e-3 if id(group["params"][0]) in decays else 1e-3
        assert group["lr"] == expected
    assert sum(len(g["params"]) for g in groups if g["lr"] == 2e-3) == len(decays) == 2


def test_a_run_of_one_step_uses_the_first_rate():
    assert rates("cos", total=1) == [1e-3]


def group_names(model, **settings):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model.named_parameters(), **settings)
    return {(g["lr_scale"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}


def test_full_tuning_decays_matrices_but_not_vectors_and_embedding():
    groups = group_names(small_model(), weight_decay=0.1, doubled_lr=RWKV6.doubled_lr)
    decayed = groups[(1.0, 0.1)]
    assert "head.weight" in decayed
    assert "blocks.0.att.key.weight" in decayed
    plain = groups[(1.0, 0.0)]
    for name in ("emb.weight", "ln_out.weight", "blocks.0.att.time_maa_x", "blocks.1.ln1.bias"):
        assert name in plain
    assert groups[(2.0, 0.0)] == {f"blocks.{layer}.att.time_decay" for layer in (0, 1)}


def test_adapters_are_decayed_only_when_asked():
    model = attach(small_model(), "bone", r=8)
    assert set(group_names(model, weight_decay=0.1)) == {(1.0, 0.0)}
    assert set(group_names(model, weight_decay=0.1, decay_adapters=True)) == {(1.0, 0.1)}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    groups = parameter_groups(model.named_parameters())
    assert sum(p.numel() for g in groups for p in g["params"]) == count


def test_lora_plus_trains_b_faster():
    model = attach(small_model(), "lora", r=4)
    groups = group_names(model, lora_plus_ratio=16)
    assert set(groups) == {(1.0, 0.0), (16, 0.0)}
    assert all(name.endswith(".lora_B") for name in groups[(16, 0.0)])
    assert len(groups[(16, 0.0)]) == len(groups[(1.0, 0.0)]) == 16
