"""WKV6's CUDA kernels run on the CPU, and random cases with their exact results."""

import ctypes
import itertools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from helpers.emulation import DTYPE_CODES, ORDERS, Guarded, compile_emulated
from torch import Tensor

from finchtune.ops.wkv6.reference import wkv6_reference
from finchtune.ops.wkv6.sequential import Wkv6Problem

REGIMES = ("typical", "strong", "mixed", "weak", "wide")
INPUTS = ("r", "k", "v", "w", "dy", "u", "state", "dstate")
STATE_OUTPUTS = ("state", "dstate_in")
BUFFERS = ("checkpoint", "forward_scratch", "backward_scratch")


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


class Emulator:
    """The launchers of cuda/gpu/wkv6.h. Raises CalledProcessError where they do not compile."""

    def __init__(self, folder: Path):
        self.library = compile_emulated("wkv6.cu", folder / "libwkv6_emulated.so")
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
