"""The memory that is estimated against what torch's allocator hands out and autograd keeps."""

import dataclasses

import pytest
import torch
from helpers.support import NUMBERS, every_generation, small_model
from helpers.tape import TapeRecorder
from torch.profiler import ProfilerActivity, profile

from finchtune import distributed
from finchtune.adapters import attach
from finchtune.config import TrainConfig
from finchtune.data import Batch
from finchtune.memory.estimate import StorageCount, activations, estimate, simulate
from finchtune.memory.zero import Zero
from finchtune.models.graphed_blocks import GraphedBlocks
from finchtune.models.rwkv6 import ModelConfig
from finchtune.ops.kernels import kernels_absent
from finchtune.training.engine import Engine
from finchtune.training.setup import model_plan, planned_model

SIZES = ModelConfig(n_layer=3, n_embd=64, vocab_size=512, head_size=16)
TOKENS = (2, 96)
METHODS = [("none", {}), ("bone", {"bone_r": 16}), ("bat", {"bat_r": 16}), ("lora", {"lora_r": 4}),
           ("pissa", {"pissa_r": 4})]  # fmt: skip


def run_config(peft, hyperparameters, grad_cp=False, **more):
    batch = {"micro_bsz": TOKENS[0], "ctx_len": TOKENS[1]}
    return TrainConfig(peft=peft, grad_cp=grad_cp, **hyperparameters, **batch, **more)


def sizes_of(generation):
    return NUMBERS[generation].sizes(n_layer=3, n_embd=64, vocab_size=512, head_size=16)


def real_model(config, dtype, generation=6):
    sizes = {"n_layer": 3, "n_embd": 64, "vocab_size": 512, "head_size": 16}
    model = small_model(**sizes, generation=generation)
    if config.peft != "none":
        attach(model, config.peft, **config.adapter_hyperparameters)
    model.grad_checkpoint = config.grad_cp
    return model.to(dtype)


def allocated(work):
    """(bytes more than before when `work` is over, highest bytes more) by torch's CPU allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return live, peak


@pytest.mark.parametrize(("peft", "hyperparameters"), METHODS, ids=[m for m, _ in METHODS])
@every_generation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_kept_for_backward_is_what_autograd_saves(peft, hyperparameters, dtype, generation):
    config = run_config(peft, hyperparameters)
    model, tokens = real_model(config, dtype, generation), torch.randint(1, 512, TOKENS)
    own = {t.untyped_storage().data_ptr() for t in [*model.state_dict().values(), tokens]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pack(model.loss(tokens, tokens)[0])
    found = simulate(config, planned_model(config, sizes_of(generation), dtype))
    assert found.saved == sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize(("peft", "hyperparameters"), METHODS, ids=[m for m, _ in METHODS])
@pytest.mark.parametrize("grad_cp", [False, True])
@every_generation
def test_peak_of_forward_and_backward_is_the_allocators(peft, hyperparameters, grad_cp, generation):
    config = run_config(peft, hyperparameters, grad_cp)
    model, tokens = real_model(config, torch.float32, generation), torch.randint(1, 512, TOKENS)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    _, peak = allocated(lambda: model.loss(tokens, tokens)[0].backward())
    planned = planned_model(config, sizes_of(generation), torch.float32)
    assert simulate(config, planned).peak == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize(("peft", "hyperparameters"), METHODS[:3], ids=[m for m, _ in METHODS[:3]])
@pytest.mark.parametrize(
    ("grad_cp", "dtype"), [(0, torch.float32), (1, torch.bfloat16)], ids=["0, fp32", "1, bf16"]
)
@every_generation
def test_without_kernels_the_peak_is_that_of_plain_torch(
    peft, hyperparameters, dtype, grad_cp, generation, kernels
):
    """Which keeps what the kernels compute again: more than they do, and all of it counted."""
    config = run_config(peft, hyperparameters, grad_cp)
    model, tokens = real_model(config, dtype, generation), torch.randint(1, 512, TOKENS)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    planned = planned_model(config, sizes_of(generation), dtype)
    compiled = simulate(config, planned).peak
    with kernels_absent():
        _, peak = allocated(lambda: model.loss(tokens, tokens)[0].backward())
        found = simulate(config, planned_model(config, sizes_of(generation), dtype)).peak
    assert found == pytest.approx(peak, rel=0.03)
    assert found > 1.3 * compiled


@pytest.mark.parametrize("grad_cp", [False, True])
def test_many_blocks_follow_from_two_and_three(grad_cp):
    config = run_config("bone", {"bone_r": 16}, grad_cp)
    deep = ModelConfig(n_layer=7, n_embd=64, vocab_size=512, head_size=16)
    found = activations(config, model_plan(config, deep, torch.bfloat16))
    exact = simulate(config, planned_model(config, deep, torch.bfloat16))
    assert (found.saved, found.loss, found.peak) == (exact.saved, exact.loss, exact.peak)


def test_sharing_among_ranks_takes_what_each_stage_promises():
    config = run_config("none", {}, grad_cp=True)
    plan = model_plan(config, SIZES, torch.bfloat16)
    made = activations(config, plan)
    K = sum(p.numel() for p in plan.model.parameters())
    alone = estimate(config, plan, 1, made=made, stage=1)
    assert alone.parts["moments"] == 8 * K
    four = [estimate(config, plan, 4, made=made, stage=s) for s in range(4)]
    assert four[0].parts["moments"] == 8 * K
    assert four[1].parts["moments"] == pytest.approx(2 * K, abs=64)
    assert four[0].total > four[1].total > four[2].total
    away = estimate(config, plan, 4, made=made, stage=2, offload=True)
    # Masters, their gradients and moments, and 2 bytes of what goes back to the device.
    biggest = 2 * 512 * 64  # the staging buffer, on both sides
    assert away.host == pytest.approx(18 * K / 4 + biggest, abs=64)
    assert away.total < four[2].total


@pytest.mark.parametrize(("stage", "share"), [(0, 1), (1, 1), (2, 4), (3, 4)])
def test_gradients_are_shared_from_stage_two_on(stage, share):
    model = planned_model(run_config("none", {}), SIZES, torch.bfloat16)
    K = sum(p.numel() for p in model.parameters())
    state = Zero(model, torch.bfloat16, stage, 4).state()
    moments = (state.standing, state.backward_end, state.norm, state.update)
    gradients = max(parts.get("gradients", 0) for parts in moments)
    assert gradients == pytest.approx(2 * K / share, abs=8)


@pytest.mark.parametrize("strategy", ["1", "2_offload", "3", "3_offload"])
@pytest.mark.parametrize("peft", ["none", "bone"])
def test_the_peak_of_a_step_under_deepspeed_is_estimated(strategy, peft):
    hyperparameters = {"bone_r": 16} if peft == "bone" else {}
    config = run_config(peft, hyperparameters, strategy=f"deepspeed_stage_{strategy}")
    device = torch.device("cpu")
    distributed.init_process_group(device)
    tokens = torch.randint(1, 512, TOKENS)
    with StorageCount() as count:
        engine = Engine(real_model(config, torch.bfloat16), config, device)
        count.restart_peak()
        for _ in range(3):
            engine.step([Batch(tokens, tokens)], 1e-3)
    engine.close()
    distributed.shutdown()
    found = estimate(config, model_plan(config, SIZES, torch.bfloat16))
    assert found.total + found.host == pytest.approx(count.peak, rel=0.05)


@pytest.mark.parametrize("grad_cp", [0, 1, 2])
def test_a_blocks_new_state_keeps_no_more_alive_than_itself(grad_cp):
    """While the loss is computed every block's state is there, but not what it was cut from."""
    config = run_config("bone", {"bone_r": 16}, grad_cp)
    two, three = (
        simulate(config, model_plan(config, SIZES, torch.float32).make(n)) for n in (2, 3)
    )
    B, C = TOKENS[0], 64
    assert 0 < three.loss - two.loss <= 4 * (2 * B * C + B * C * 16)


@pytest.mark.parametrize("peft", ["none", "bone"])
@every_generation
def test_what_graphs_hold_is_estimated(peft, generation):
    config = run_config(peft, {"bone_r": 16}, 1, cuda_graphs=True)
    model, tokens = real_model(config, torch.bfloat16, generation), torch.randint(1, 512, TOKENS)
    model.graphs = GraphedBlocks(TapeRecorder())
    for _ in range(2):
        model.loss(tokens, tokens)
    buffers = sum(x.nbytes for x in model.graphs.buffers.made.values())
    plan = model_plan(config, sizes_of(generation), torch.bfloat16)
    made = activations(config, plan)
    found = estimate(config, plan, made=made)
    assert buffers <= found.parts["graphs"] - made.backward <= 2 * buffers
    without = estimate(dataclasses.replace(config, cuda_graphs=False), plan, made=made)
    assert without.total < found.total
