"""WKV7's CUDA kernels, run on the CPU by emulation, against float64 autograd of the recurrence."""

import ctypes
import itertools

import pytest
import torch
from helpers.emulation import ORDERS, Guarded
from helpers.wkv import errors, evaluate, one_thread, rms
from helpers.wkv7_cases import NAMES, REGIMES, in_dtype, make_inputs, oracle
from helpers.wkv7_emulator import Emulator, pointers

from finchtune.ops.wkv6.sequential import Wkv6Problem
from finchtune.ops.wkv7 import wkv7_reference

FP32_MAX = 3e-6
ROUNDING_RMS = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4}


@pytest.fixture(autouse=True)
def quiet():
    with one_thread():
        yield


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("wkv7"))


def check(got, exact, tolerance=FP32_MAX):
    found = errors(NAMES, got, exact)
    assert all(error <= tolerance for error in found.values()), found


@pytest.mark.parametrize("regime", REGIMES)
def test_every_length(emulator, regime):
    """Packed, an empty sequence among them."""
    lengths = [1, 2, 15, 0, 16, 17, 65, 203]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    inputs = make_inputs(regime, 1, sum(lengths), 2, 16, n_sequences=len(lengths))
    exact = evaluate(wkv7_reference, inputs, cu_seqlens)
    check(emulator.run(in_dtype(inputs, torch.float32), cu_seqlens), exact)


@pytest.mark.parametrize("N", [8, 24, 32, 40, 64, 120, 128])
def test_head_sizes(emulator, N):
    inputs, exact = oracle("typical", 1, 17, 2, N)
    check(emulator.run(in_dtype(inputs, torch.float32)), exact)


@pytest.mark.parametrize("dtype", ROUNDING_RMS, ids=str)
def test_low_precision_only_rounds_its_results(emulator, dtype):
    inputs = in_dtype(make_inputs("typical", 2, 70, 1, 64), dtype)
    exact = evaluate(wkv7_reference, [x.double() for x in inputs])
    found = rms(NAMES, emulator.run(inputs), exact)
    assert max(found.values()) <= ROUNDING_RMS[dtype], found


def test_states_may_be_left_out(emulator):
    *rows, state, grad_y, grad_state = make_inputs("typical", 2, 20, 1, 16)
    zeros = [*rows, 0 * state, grad_y, 0 * grad_state]
    exact = evaluate(wkv7_reference, zeros)
    *rows, _, grad_y, _ = in_dtype(zeros, torch.float32)
    check(emulator.run([*rows, None, grad_y, None]), exact)


def test_every_thread_schedule_gives_the_same_bits(emulator):
    """A missing barrier shows as a difference, or as NaN, in at least one of them."""
    inputs = in_dtype(make_inputs("typical", 1, 75, 1, 40), torch.float32)
    runs = [emulator.run(inputs, order=order) for order in ORDERS]
    for order, outputs in zip(ORDERS, runs, strict=True):
        for name, x, first in zip(NAMES, outputs, runs[0], strict=True):
            assert torch.equal(x, first), (order, name)


def test_decays_that_clear_the_state(emulator):
    inputs = in_dtype(make_inputs("typical", 1, 20, 1, 16), torch.float32)
    inputs[3] = torch.full_like(inputs[3], 200.0)
    assert all(x.isfinite().all() for x in emulator.run(inputs))


@pytest.mark.parametrize(("N", "shift", "message"), [(12, 0, b"argument"), (64, 1, b"address")])
def test_what_the_kernels_do_not_take_is_refused(emulator, N, shift, message):
    """Head sizes, and tensors that do not begin at a multiple of 16 bytes."""
    problem = Wkv6Problem(1, 20, 1, N, 1, 1, None)
    rows = [Guarded((20 * N + 1,), torch.bfloat16) for _ in range(6)]
    for row in rows:
        row.tensor = row.tensor[shift:]
    error = emulator.library.wkv7_forward(ctypes.byref(problem), pointers(rows), *[None] * 5)
    assert message in emulator.library.wkv7_error_string(error)
