"""The CUDA kernels, run on the CPU by the emulation beside this file, against float64 autograd."""

import ctypes
import itertools
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from finchtune.wkv.reference import wkv6_reference

EMULATION = Path(__file__).parent / "emulation"
CUDA = Path(__file__).parents[2] / "cuda"
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ORDERS = ("forward", "reverse", "random", "warp by warp", "warp by warp, reversed")
REGIMES = ("typical", "strong", "mixed", "weak", "wide")
TOKEN_INPUTS = ("r", "k", "v", "w", "dy")
GUARD = 64  # elements of NaN around every tensor


class Problem(ctypes.Structure):
    """Wkv6Problem of cuda/wkv6.h."""

    _fields_ = (
        ("B", ctypes.c_int64),
        ("T", ctypes.c_int64),
        ("H", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("n_seq", ctypes.c_int64),
        ("cu_seqlens", ctypes.c_void_p),
    )


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
    """The launchers of cuda/wkv6.h."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.wkv6_error_string.restype = ctypes.c_char_p
        for name in ("checkpoint", "forward_scratch", "backward_scratch"):
            getattr(self.library, f"wkv6_{name}_bytes").restype = ctypes.c_size_t

    def bytes(self, name: str, problem: Problem) -> Guarded:
        """A buffer of as many bytes as the library asks for."""
        count = getattr(self.library, f"wkv6_{name}_bytes")(ctypes.byref(problem))
        return Guarded((count // 4,), torch.float32)

    def launch(self, name: str, problem: Problem, *arguments) -> None:
        error = getattr(self.library, name)(ctypes.byref(problem), *arguments, None)
        assert error == 0, self.library.wkv6_error_string(error).decode()

    def run(
        self, case: Case, order: str = "forward", eager: bool = False, multiprocessors: int = 1
    ) -> dict[str, Tensor]:
        """Forward and backward; every output and gradient by name."""
        self.library.emulation_configure(ORDERS.index(order), eager, multiprocessors)
        B, T, H, N = case.r.shape
        dtype = case.r.dtype
        bounds = None if case.cu_seqlens is None else case.cu_seqlens.data_ptr()
        problem = Problem(B, T, H, N, DTYPE_CODES[dtype], case.n_seq, bounds)
        inputs = {
            name: Guarded(x.shape, x.dtype, x)
            for name, x in vars(case).items()
            if isinstance(x, Tensor) and name != "cu_seqlens"
        }
        token, state = (B, T, H, N), (case.n_seq, H, N, N)
        outputs = {
            **{name: Guarded(token, dtype) for name in ("y", "dr", "dk", "dv", "dw")},
            "du": Guarded((H, N), torch.float32),
            "state": Guarded(state, torch.float32),
            "dstate_in": Guarded(state, torch.float32),
        }
        buffers = {
            name: self.bytes(name, problem)
            for name in ("checkpoint", "forward_scratch", "backward_scratch")
        }
        everything = SimpleNamespace(
            **{
                name: guarded.pointer
                for name, guarded in {**buffers, **inputs, **{f"out_{n}": g for n, g in outputs.items()}}.items()
            }
        )
        p = everything
        state_in = getattr(p, "state", None)
        dstate = getattr(p, "dstate", None)
        self.launch(
            "wkv6_forward", problem, p.r, p.k, p.v, p.w, p.u, state_in, p.out_y, p.out_state,
            p.checkpoint, p.forward_scratch,
        )  # fmt: skip
        self.launch(
            "wkv6_backward", problem, p.r, p.k, p.v, p.w, p.u, p.dy, dstate, p.checkpoint,
            p.out_dr, p.out_dk, p.out_dv, p.out_dw, p.out_du, p.out_dstate_in, p.backward_scratch,
        )  # fmt: skip
        for name, guarded in {**buffers, **outputs}.items():
            guarded.check(name)
        return {name: guarded.tensor for name, guarded in outputs.items()}


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Emulator:
    library = tmp_path_factory.mktemp("wkv6") / "libwkv6_emulated.so"
    subprocess.run(
        ["g++", "-O2", "-std=c++17", "-shared", "-fPIC", "-fno-strict-aliasing", f"-I{EMULATION}",
         f"-I{CUDA}", "-o", library, EMULATION / "host.cpp"],
        check=True,
    )  # fmt: skip
    return Emulator(library)


if __name__ == "__main__":
    import sys, time
    torch.set_num_threads(1)
    E = Emulator(Path("/tmp/wkvcuda/emu.so"))
    def show(label, case, **kw):
        t=time.time(); out=E.run(case, **kw); dt=time.time()-t
        print(label, "%.2fs"%dt, " ".join(f"{n}:{((out[n].double()-x).norm()/x.norm()).item():.1e}" for n,x in case.expected.items()), flush=True)
        return out
    for reg in REGIMES:
        show(reg+" packed", make_case(reg, lengths=[1,2,3,15,0,16,17,63,64,65]))
        show(reg+" T203 H2", make_case(reg, T=203, H=2))
        c=make_case(reg, T=41, H=2, N=24, dtype=torch.float32); out=show(reg+" scan24", c)
        print('   relmax', {n: f"{((out[n].double()-x).abs().max()/x.abs().max()).item():.1e}" for n,x in c.expected.items()})
