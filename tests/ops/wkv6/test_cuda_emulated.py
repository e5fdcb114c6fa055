"""The CUDA kernels, run on the CPU by the emulation beside this file, against float64 autograd."""

import ctypes
import itertools
from dataclasses import replace

import pytest
import torch
from helpers.emulation import ORDERS, Guarded
from helpers.wkv6_emulator import (
    DTYPE_CODES,
    REGIMES,
    Case,
    Emulator,
    make_case,
    problem_of,
    reference,
)
from torch import Tensor

from finchtune.ops.wkv6.sequential import Wkv6Problem


@pytest.fixture(autouse=True)
def one_torch_thread():
    """The reference's small products are slower when threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("wkv6"))


def rms_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def max_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


def check(case: Case, outputs: dict[str, Tensor], error, tolerance: float) -> None:
    """Every output within the tolerance; a NaN fails. `pytest -s` shows the errors."""
    errors = {name: error(outputs[name], x) for name, x in case.expected.items()}
    print(error.__name__, *(f"{name} {x:.1e}" for name, x in errors.items()))
    assert all(x <= tolerance for x in errors.values()), errors


# Rounding the exact results to bf16 costs 1.7e-3 alone; the operands of the products are bf16 too.
BF16_RMS = 4e-3
ROUNDING_RMS = {torch.bfloat16: 2e-3, torch.float16: 2.5e-4}
FP32_MAX = 2e-6


@pytest.mark.parametrize("regime", REGIMES)
def test_tensor_cores_at_every_length(emulator, regime):
    """Packed, so that sequences shorter than a block of tokens run on tensor cores too."""
    case = make_case(regime, lengths=[1, 2, 3, 15, 0, 16, 17, 63, 64, 65])
    check(case, emulator.run(case), rms_error, BF16_RMS)


@pytest.mark.parametrize("regime", REGIMES)
def test_tensor_cores_over_several_heads(emulator, regime):
    case = make_case(regime, T=203, H=2)
    check(case, emulator.run(case), rms_error, BF16_RMS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_may_be_left_out(emulator, dtype):
    case = make_case("typical", B=2, T=65, dtype=dtype, states=False)
    check(case, emulator.run(case), rms_error, BF16_RMS)


@pytest.mark.parametrize(
    ("regime", "lengths"), [("typical", None), ("mixed", [300, 0, 1, 520])], ids=["batch", "packed"]
)
def test_few_heads_are_cut_into_segments(emulator, regime, lengths):
    """A GPU of 16 multiprocessors wants more than two heads: the sequences run in parts."""
    case = make_case(regime, T=600, H=2, lengths=lengths)
    outputs = emulator.run(case, multiprocessors=16)
    assert emulator.buffer("forward_scratch", problem_of(case)).tensor.numel() > 0
    check(case, outputs, rms_error, BF16_RMS)


@pytest.mark.parametrize(("B", "H", "places"), [(4, 1, 3), (2, 3, 4)])
def test_only_the_heads_of_the_last_turn_are_cut(emulator, B, H, places):
    case = make_case("mixed", B=B, H=H, T=530)
    assert emulator.schedule(case, places) == (320, B * H // places * places, 2)
    check(case, emulator.run(case, multiprocessors=places), rms_error, BF16_RMS)


def test_one_long_sequence_among_short_ones_is_cut(emulator):
    case = make_case("typical", H=2, lengths=[17, 3, 40, 900, 5, 0, 64, 70])
    length, whole, _ = emulator.schedule(case, 8)
    assert whole == 0
    assert length < 900
    check(case, emulator.run(case, multiprocessors=8), rms_error, BF16_RMS)


@pytest.mark.parametrize("places", [170, 264, 396, 528])
@pytest.mark.parametrize("T", [300, 4096, 5000])
def test_the_places_of_a_gpu_are_filled_evenly(emulator, places, T):
    """Where a sequence is long enough, a place waits for less than a third of a sequence."""
    for B, H in itertools.product([1, 2, 3, 8, 16], [12, 32, 40, 64]):
        problem = Wkv6Problem(B, T, H, 64, DTYPE_CODES[torch.bfloat16], B, None)
        length, whole, per_head = emulator.schedule_of(problem, places)
        rest = B * H - whole
        turns = -(-whole // places)
        if rest:
            assert whole % places == 0
            assert length % 64 == 0
            assert (per_head - 1) * length < T <= per_head * length
            turns += -(-rest * per_head // places) * length / T
        assert T == 300 or turns - B * H / places < 1 / 3, (B, H, turns)


@pytest.mark.parametrize("regime", REGIMES)
def test_scan_in_fp32(emulator, regime):
    case = make_case(regime, lengths=[1, 2, 3, 15, 0, 16, 17, 63, 64, 65], dtype=torch.float32)
    check(case, emulator.run(case), max_error, FP32_MAX)


@pytest.mark.parametrize("N", [8, 24, 40, 128])
def test_scan_of_other_head_sizes(emulator, N):
    case = make_case("mixed", B=2, T=83, H=2, N=N, dtype=torch.float32)
    check(case, emulator.run(case), max_error, FP32_MAX)


@pytest.mark.parametrize("dtype", ROUNDING_RMS, ids=str)
@pytest.mark.parametrize("regime", ["typical", "mixed"])
def test_scan_in_low_precision_only_rounds_its_results(emulator, dtype, regime):
    case = make_case(regime, T=70, H=2, N=32, dtype=dtype)
    check(case, emulator.run(case), rms_error, ROUNDING_RMS[dtype])


@pytest.mark.parametrize("T", [1, 2, 3, 15, 16])
def test_short_sequences_take_the_scan(emulator, T):
    """Its results are only rounded, which those of the tensor cores are not."""
    case = make_case("typical", B=2, T=T, H=2)
    check(case, emulator.run(case), rms_error, ROUNDING_RMS[torch.bfloat16])


def test_older_gpus_take_the_scan(emulator):
    """Compute capability 7.5 has no bf16 tensor cores and no asynchronous copies."""
    case = make_case("mixed", B=2, T=80)
    check(case, emulator.run(case, capability=7), rms_error, ROUNDING_RMS[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("w", "kept"), [(200.0, 0.0), (-200.0, 1.0)])
def test_decays_beyond_fp32_range(emulator, dtype, w, kept):
    """exp(w) may overflow or vanish: the state is cleared, or kept, and no gradient is NaN."""
    case = make_case("typical", T=20, dtype=dtype)
    outputs = emulator.run(replace(case, k=0 * case.k, w=torch.full_like(case.w, w)))
    torch.testing.assert_close(outputs["state"], kept * case.state)
    assert all(x.isfinite().all() for x in outputs.values())


SCHEDULES = [(order, eager) for order in ORDERS for eager in (False, True)]


@pytest.mark.parametrize(
    ("regime", "options"),
    [
        ("mixed", {"lengths": [81, 5, 150]}),
        ("weak", {"T": 330}),  # a segment's first tokens must reach its end
        ("mixed", {"T": 75, "dtype": torch.float32, "N": 40}),
    ],
    ids=["tensor cores", "segments", "scan"],
)
def test_every_thread_schedule_gives_the_same_bits(emulator, regime, options):
    """A missing barrier or wait shows as a difference, or as NaN, in at least one of them."""
    case = make_case(regime, **options)
    runs = [emulator.run(case, *schedule, multiprocessors=16) for schedule in SCHEDULES]
    check(case, runs[0], rms_error, BF16_RMS)
    for schedule, outputs in zip(SCHEDULES, runs, strict=True):
        for name, x in outputs.items():
            assert torch.equal(x, runs[0][name]), (schedule, name)


def test_forward_alone_needs_no_checkpoints(emulator):
    case = make_case("typical", T=100)
    y = Guarded(case.r.shape, case.r.dtype)
    inputs = [Guarded(x.shape, x.dtype, x) for x in (case.r, case.k, case.v, case.w, case.u)]
    pointers = [x.pointer for x in inputs]
    emulator.launch("wkv6_forward", problem_of(case), *pointers, None, y.pointer, None, None, None)
    y.check("y")
    without_state = reference(replace(case, state=None))["y"]
    assert rms_error(y.tensor, without_state) <= BF16_RMS


@pytest.mark.parametrize("N", [4, 12, 136])
def test_unsupported_head_sizes_are_refused(emulator, N):
    problem = Wkv6Problem(1, 20, 1, N, 1, 1, None)
    error = emulator.library.wkv6_forward(ctypes.byref(problem), *[None] * 11)
    assert emulator.library.wkv6_error_string(error) == b"invalid argument"


def test_misaligned_tensors_are_refused(emulator):
    problem = Wkv6Problem(1, 20, 1, 64, 1, 1, None)
    buffer = Guarded((1281,), torch.bfloat16)
    r = ctypes.c_void_p(buffer.tensor[1:].data_ptr())
    error = emulator.library.wkv6_forward(ctypes.byref(problem), r, *[None] * 10)
    assert emulator.library.wkv6_error_string(error) == b"misaligned address"


def test_more_thread_blocks_than_a_grid_holds_are_refused(emulator):
    """Heads beyond 2^31 - 1 would otherwise be left out."""
    problem = Wkv6Problem(2**16, 2, 2**16, 8, 0, 2**16, None)
    error = emulator.library.wkv6_forward(ctypes.byref(problem), *[None] * 11)
    assert emulator.library.wkv6_error_string(error) == b"invalid configuration argument"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("T", [17, 63, 64, 65, 203, 1000])
def test_every_length_and_regime(emulator, T, regime, dtype):
    case = make_case(regime, B=2, T=T, H=3, dtype=dtype)
    tensor_cores = dtype == torch.bfloat16
    error, tolerance = (rms_error, BF16_RMS) if tensor_cores else (max_error, FP32_MAX)
    check(case, emulator.run(case), error, tolerance)
    check(case, emulator.run(case, "random", multiprocessors=16), error, tolerance)
