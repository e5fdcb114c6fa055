"""WKV7's CUDA kernels, run on the CPU by emulation, against float64 autograd of the recurrence."""

import ctypes
import itertools

import pytest
import torch
from helpers.emulation import ORDERS, Guarded
from helpers.wkv import evaluate, one_thread, rms
from helpers.wkv7_cases import (
    FP32_TOLERANCE,
    NAMES,
    REGIMES,
    assert_close,
    in_dtype,
    make_inputs,
    oracle,
)
from helpers.wkv7_emulator import Emulator, pointers

from finchtune.ops.wkv6.sequential import Wkv6Problem
from finchtune.ops.wkv7 import wkv7_reference

ROUNDING_RMS = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
TENSOR_CORES_RMS = 6e-3


@pytest.fixture(autouse=True)
def quiet():
    with one_thread():
        yield


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("wkv7"))


def packed(regime, lengths, H, N):
    """Inputs of sequences of these lengths, and their boundaries."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return make_inputs(regime, 1, sum(lengths), H, N, n_sequences=len(lengths)), cu_seqlens


def check_bf16(emulator, inputs, tolerance, cu_seqlens=None, **options):
    """Outputs against the exact ones of the same rounded inputs; `pytest -s` shows the errors."""
    inputs = in_dtype(inputs, torch.bfloat16)
    exact = evaluate(wkv7_reference, [x.double() for x in inputs], cu_seqlens)
    found = rms(NAMES, emulator.run(inputs, cu_seqlens, **options), exact)
    print(*(f"{name} {error:.1e}" for name, error in found.items()))
    assert all(error <= tolerance for error in found.values()), found


@pytest.mark.parametrize("regime", REGIMES)
def test_every_length(emulator, regime):
    """Packed, an empty sequence among them."""
    inputs, cu_seqlens = packed(regime, [1, 2, 15, 0, 16, 17, 65, 203], 2, 16)
    exact = evaluate(wkv7_reference, inputs, cu_seqlens)
    assert_close(emulator.run(in_dtype(inputs, torch.float32), cu_seqlens), exact)


@pytest.mark.parametrize("regime", REGIMES)
def test_tensor_cores_at_every_length(emulator, regime):
    """Packed, so that sequences shorter than a block of tokens run on tensor cores too."""
    inputs, cu_seqlens = packed(regime, [1, 2, 15, 0, 16, 17, 65, 203], 1, 64)
    check_bf16(emulator, inputs, TENSOR_CORES_RMS, cu_seqlens)


def test_tensor_cores_over_several_heads(emulator):
    check_bf16(emulator, make_inputs("typical", 2, 70, 2, 64), TENSOR_CORES_RMS)


@pytest.mark.slow
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("T", [17, 63, 64, 65, 203, 1000])
def test_tensor_cores_at_every_length_and_regime(emulator, T, regime):
    inputs = make_inputs(regime, 2, T, 2, 64)
    check_bf16(emulator, inputs, TENSOR_CORES_RMS)
    check_bf16(emulator, inputs, TENSOR_CORES_RMS, order="random")


def test_tensor_cores_with_stronger_decays_than_a_model_has(emulator):
    inputs = make_inputs("typical", 1, 70, 1, 64)
    inputs = [*inputs[:3], torch.rand_like(inputs[3]) * 9 - 8, *inputs[4:]]  # w up to 1
    check_bf16(emulator, inputs, TENSOR_CORES_RMS)


@pytest.mark.parametrize(("T", "capability"), [(1, 8), (16, 8), (80, 7)])
def test_short_sequences_and_older_gpus_take_the_scan(emulator, T, capability):
    """Its results are only rounded, which those of the tensor cores are not."""
    inputs = make_inputs("typical", 2, T, 1, 64)
    check_bf16(emulator, inputs, ROUNDING_RMS[torch.bfloat16], capability=capability)


@pytest.mark.parametrize("N", [8, 24, 32, 40, 64, 120, 128])
def test_head_sizes(emulator, N):
    inputs, exact = oracle("typical", 1, 17, 2, N)
    assert_close(emulator.run(in_dtype(inputs, torch.float32)), exact)


@pytest.mark.parametrize("dtype", ROUNDING_RMS, ids=str)
def test_low_precision_only_rounds_its_results(emulator, dtype):
    inputs = in_dtype(make_inputs("typical", 2, 70, 1, 40), dtype)
    exact = evaluate(wkv7_reference, [x.double() for x in inputs])
    found = rms(NAMES, emulator.run(inputs), exact)
    assert max(found.values()) <= ROUNDING_RMS[dtype], found


@pytest.mark.parametrize(("N", "dtype"), [(16, torch.float32), (64, torch.bfloat16)], ids=str)
def test_states_may_be_left_out(emulator, N, dtype):
    *rows, state, grad_y, grad_state = make_inputs("typical", 2, 20, 1, N)
    zeros = in_dtype([*rows, 0 * state, grad_y, 0 * grad_state], dtype)
    exact = evaluate(wkv7_reference, [x.double() for x in zeros])
    *rows, _, grad_y, _ = zeros
    found = rms(NAMES, emulator.run([*rows, None, grad_y, None]), exact)
    tolerance = FP32_TOLERANCE if dtype == torch.float32 else TENSOR_CORES_RMS
    assert all(error <= tolerance for error in found.values()), found


def test_forward_alone_needs_no_checkpoints(emulator):
    *rows, state, _, _ = in_dtype(make_inputs("typical", 1, 100, 1, 64), torch.bfloat16)
    given = [Guarded(x.shape, x.dtype, x) for x in (*rows, state)]
    y = Guarded(rows[0].shape, torch.bfloat16)
    problem = Wkv6Problem(*rows[0].shape, 1, 1, None)
    before = given[-1].pointer
    emulator.launch("wkv7_forward", problem, pointers(given[:-1]), before, y.pointer, None, None)
    y.check("y")
    exact, _ = wkv7_reference(*(x.double() for x in (*rows, state)))
    assert rms(["y"], [y.tensor], [exact])["y"] <= TENSOR_CORES_RMS


SCHEDULES = [(order, eager) for order in ORDERS for eager in (False, True)]


@pytest.mark.parametrize(
    ("lengths", "N", "dtype"),
    [([75], 40, torch.float32), ([81, 5, 150], 64, torch.bfloat16)],
    ids=["scan", "tensor cores"],
)
def test_every_thread_schedule_gives_the_same_bits(emulator, lengths, N, dtype):
    """A missing barrier or wait shows as a difference, or as NaN, in at least one of them."""
    inputs, cu_seqlens = packed("typical", lengths, 1, N)
    inputs = in_dtype(inputs, dtype)
    runs = [emulator.run(inputs, cu_seqlens, *schedule) for schedule in SCHEDULES]
    for schedule, outputs in zip(SCHEDULES, runs, strict=True):
        for name, x, first in zip(NAMES, outputs, runs[0], strict=True):
            assert torch.equal(x, first), (schedule, name)


@pytest.mark.parametrize(("w", "kept"), [(200.0, 0.0), (-200.0, 1.0)])
@pytest.mark.parametrize(("N", "dtype"), [(16, torch.float32), (64, torch.bfloat16)], ids=str)
def test_decays_beyond_fp32_range(emulator, N, dtype, w, kept):
    """exp(w) may overflow or vanish: the state is cleared, or kept, and no gradient is NaN."""
    r, k, v, _, a, *rest = in_dtype(make_inputs("typical", 1, 20, 1, N), dtype)
    state = rest[1]
    outputs = emulator.run([r, 0 * k, v, torch.full_like(r, w), 0 * a, *rest])
    torch.testing.assert_close(outputs[1], kept * state)
    assert all(x.isfinite().all() for x in outputs)


@pytest.mark.parametrize(("N", "shift", "message"), [(12, 0, b"argument"), (64, 1, b"address")])
def test_what_the_kernels_do_not_take_is_refused(emulator, N, shift, message):
    """Head sizes, and tensors that do not begin at a multiple of 16 bytes."""
    problem = Wkv6Problem(1, 20, 1, N, 1, 1, None)
    rows = [Guarded((20 * N + 1,), torch.bfloat16) for _ in range(6)]
    for row in rows:
        row.tensor = row.tensor[shift:]
    error = emulator.library.wkv7_forward(ctypes.byref(problem), pointers(rows), *[None] * 5)
    assert message in emulator.library.wkv7_error_string(error)
