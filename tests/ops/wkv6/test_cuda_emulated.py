"""The CUDA kernels, run on the CPU by the emulation beside this file, against float64 autograd."""

import ctypes
import itertools
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from finchtune.ops.wkv6.reference import wkv6_reference
from finchtune.ops.wkv6.sequential import Wkv6Problem

EMULATION = Path(__file__).parent / "emulation"
CUDA = Path(__file__).parents[3] / "cuda" / "gpu"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ORDERS = ("forward", "reverse", "random", "warp by warp", "warp by warp, reversed")
REGIMES = ("typical", "strong", "mixed", "weak", "wide")
INPUTS = ("r", "k", "v", "w", "dy", "u", "state", "dstate")
STATE_OUTPUTS = ("state", "dstate_in")
BUFFERS = ("checkpoint", "forward_scratch", "backward_scratch")
GUARD = 64  # elements of NaN around every tensor


@dataclass
class Case:
    """Inputs of the operator and the gradients of its outputs; state and dstate may be None."""

    r: Tensor
    k: Tensor
    v: Tensor
    w: Tensor
    dy: Tensor
    u: Tensor
    state: Tensor | None
    dstate: Tensor | None
    cu_seqlens: Tensor | None = None
    expected: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n_seq(self) -> int:
        return len(self.r) if self.cu_seqlens is None else len(self.cu_seqlens) - 1


def raw_decay(regime: str, shape: tuple[int, ...]) -> Tensor:
    """w: from d = exp(-exp(-8)), almost 1, to d = exp(-exp(3)), almost 0."""
    noise = torch.randn(shape)
    if regime == "typical":
        return torch.linspace(-6, 1, shape[-1]) + 0.5 * noise
    if regime == "strong":
        return torch.full(shape, 3.0)
    if regime == "mixed":
        return torch.where(torch.rand(shape) < 0.5, 3.0, -8.0)
    return -8 + 0.3 * noise if regime == "weak" else -2 + 3 * noise


def make_case(
    regime: str,
    B: int = 1,
    T: int = 1,
    H: int = 1,
    N: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    lengths: list[int] | None = None,
    states: bool = True,
) -> Case:
    """A random case; `lengths` packs sequences of these lengths, B and T then follow."""
    cu_seqlens = None
    if lengths is not None:
        B, T = 1, sum(lengths)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    r, k, v, dy = (torch.randn(B, T, H, N).to(dtype) for _ in range(4))
    w = raw_decay(regime, (B, T, H, N)).to(dtype)
    n_seq = B if lengths is None else len(lengths)
    state, dstate = (torch.randn(n_seq, H, N, N) if states else None for _ in range(2))
    case = Case(r, k, v, w, dy, 0.5 * torch.randn(H, N), state, dstate, cu_seqlens)
    case.expected = reference(case)
    return case


def reference(case: Case) -> dict[str, Tensor]:
    """Outputs and gradients in float64."""
    leaves = [x.double().requires_grad_() for x in (case.r, case.k, case.v, case.w, case.u)]
    H, N = case.u.shape
    state = torch.zeros(case.n_seq, H, N, N) if case.state is None else case.state
    leaves.append(state.double().requires_grad_())
    y, final = wkv6_reference(*leaves, case.cu_seqlens)
    loss = (y * case.dy.double()).sum()
    if case.dstate is not None:
        loss = loss + (final * case.dstate.double()).sum()
    names = ("dr", "dk", "dv", "dw", "du", "dstate_in")
    gradients = dict(zip(names, torch.autograd.grad(loss, leaves), strict=True))
    return {"y": y.detach(), "state": final.detach(), **gradients}


def problem_of(case: Case) -> Wkv6Problem:
    bounds = None if case.cu_seqlens is None else case.cu_seqlens.data_ptr()
    return Wkv6Problem(*case.r.shape, DTYPE_CODES[case.r.dtype], case.n_seq, bounds)


class Guarded:
    """A tensor between two stretches of NaN, so that reads and writes beyond it show."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, values: Tensor | None = None):
        size = torch.Size(shape).numel()
        self.buffer = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype)
        self.tensor = self.buffer[GUARD : GUARD + size].view(shape)
        if values is not None:
            self.tensor.copy_(values)

    @property
    def pointer(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.tensor.data_ptr())

    def check(self, name: str) -> None:
        guards = torch.cat([self.buffer[:GUARD], self.buffer[-GUARD:]])
        assert guards.isnan().all(), f"the kernel wrote beyond {name}"


class Emulator:
    """The launchers of cuda/gpu/wkv6.h."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.wkv6_error_string.restype = ctypes.c_char_p
        for name in BUFFERS:
            getattr(self.library, f"wkv6_{name}_bytes").restype = ctypes.c_size_t

    def buffer(self, name: str, problem: Wkv6Problem) -> Guarded:
        """As many bytes as the library asks for."""
        count = getattr(self.library, f"wkv6_{name}_bytes")(ctypes.byref(problem))
        return Guarded((count // 4,), torch.float32)

    def launch(self, name: str, problem: Wkv6Problem, *arguments) -> None:
        error = getattr(self.library, name)(ctypes.byref(problem), *arguments, None)
        assert error == 0, self.library.wkv6_error_string(error).decode()

    def schedule_of(self, problem: Wkv6Problem, places: int) -> tuple[int, int, int]:
        """Tokens of a segment, heads that are not cut, segments of each other head."""
        values = [ctypes.c_int64() for _ in range(3)]
        pointers = map(ctypes.byref, values)
        self.library.wkv6_schedule(ctypes.byref(problem), ctypes.c_int64(places), *pointers)
        return tuple(x.value for x in values)

    def schedule(self, case: Case, places: int) -> tuple[int, int, int]:
        return self.schedule_of(problem_of(case), places)

    def run(
        self,
        case: Case,
        order: str = "forward",
        eager: bool = False,
        multiprocessors: int = 1,
        capability: int = 8,
    ) -> dict[str, Tensor]:
        """Forward and backward; every output and gradient by name."""
        self.library.emulation_configure(ORDERS.index(order), eager, multiprocessors, capability)
        problem = problem_of(case)
        H, N = case.u.shape
        given = {name: getattr(case, name) for name in INPUTS}
        inputs = {n: Guarded(x.shape, x.dtype, x) for n, x in given.items() if x is not None}
        outputs = {
            **{name: Guarded(case.r.shape, case.r.dtype) for name in ("y", "dr", "dk", "dv", "dw")},
            **{name: Guarded((case.n_seq, H, N, N), torch.float32) for name in STATE_OUTPUTS},
            "du": Guarded((H, N), torch.float32),
        }
        buffers = {name: self.buffer(name, problem) for name in BUFFERS}

        def pointers(of: dict[str, Guarded], *names: str) -> list[ctypes.c_void_p | None]:
            return [of[name].pointer if name in of else None for name in names]

        self.launch(
            "wkv6_forward",
            problem,
            *pointers(inputs, "r", "k", "v", "w", "u", "state"),
            *pointers(outputs, "y", "state"),
            *pointers(buffers, "checkpoint", "forward_scratch"),
        )
        self.launch(
            "wkv6_backward",
            problem,
            *pointers(inputs, "r", "k", "v", "w", "u", "dy", "dstate"),
            *pointers(buffers, "checkpoint"),
            *pointers(outputs, "dr", "dk", "dv", "dw", "du", "dstate_in"),
            *pointers(buffers, "backward_scratch"),
        )
        for name, guarded in {**buffers, **outputs}.items():
            guarded.check(name)
        return {name: guarded.tensor for name, guarded in outputs.items()}


@pytest.fixture(autouse=True)
def one_torch_thread():
    """The reference's small products are slower when threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Emulator:
    library = tmp_path_factory.mktemp("wkv6") / "libwkv6_emulated.so"
    subprocess.run(
        ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-fno-strict-aliasing", f"-I{EMULATION}",
         f"-I{CUDA}", "-o", library, EMULATION / "host.cpp"],
        check=True,
    )  # fmt: skip
    return Emulator(library)


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
