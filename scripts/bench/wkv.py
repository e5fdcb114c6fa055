"""How fast is WKV here: the kernels against plain torch, and against what the machine can do.

    python scripts/bench/wkv.py                   # the shapes for this machine
    python scripts/bench/wkv.py --operator wkv7 --shapes 2,512,8,64 --dtypes fp32 --json out.json

For each shape B,T,H,N: the median time of a forward, and of a forward with backward, of the
recurrence in torch, of the chunked form in torch and of the kernel; on a GPU with a head size of
64 also of sequential kernels in the style of the official ones (sequential_wkv6.cu, compiled with
nvcc; WKV6 alone), and of flash-linear-attention's where it is installed. The times of all forms are
taken alternately, so that a busy machine slows all of them alike; each follows an uncounted call of
the same form, unless --cold is given, so that one form does not find the caches full of another's
tensors. GB/s counts each tensor read or
written once, GFLOP/s the recurrence's own arithmetic; "of bound" is the time that a copy of these
bytes, or a matrix product of these operations, whichever is longer, would take, over the time
measured.
"""

import argparse
import ctypes
import functools
import math
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from finchtune.errors import UserError, run_cli
from finchtune.files import write_json
from finchtune.ops.kernels import build, cpu_paths, has_kernels
from finchtune.ops.kernels.toolkit import find_toolkit
from finchtune.ops.wkv6 import wkv6, wkv6_chunked, wkv6_reference
from finchtune.ops.wkv6.sequential import Form, sequential_form
from finchtune.ops.wkv6.triton import fits_triton, wkv6_triton
from finchtune.ops.wkv7 import wkv7, wkv7_chunked, wkv7_reference
from finchtune.ops.wkv7.triton import wkv7_triton

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The kernel, the chunked form, the recurrence, flash-linear-attention's.
OPERATORS: dict[str, tuple[Form, ...]] = {
    "wkv6": (wkv6, wkv6_chunked, wkv6_reference, wkv6_triton),
    "wkv7": (wkv7, wkv7_chunked, wkv7_reference, wkv7_triton),
}
CPU_SHAPES = ["2,512,8,64", "2,1,8,64", "2,64,8,64", "1,4096,8,64", "2,512,64,8"]
GPU_SHAPES = ["8,4096,64,64", "8,512,64,64", "8,1,64,64", "1,4096,32,64", "2,512,8,64"]
RECURRENCE_LIMIT = 1024  # tokens; beyond, the recurrence in torch only costs time
CHUNKED_LIMIT = 2**26  # elements of r; beyond, the chunked form keeps tens of GB for backward


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began


def medians(
    works: Mapping[str, Callable[[], object]],
    device: torch.device,
    budget: float,
    cold: bool = False,
) -> dict[str, float]:
    """Median seconds of each work; rounds of all works in turn until `budget` seconds are spent.

    Unless `cold`, each timed call follows an untimed one of the same work.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, work in works.items():
            if not cold:
                work()
            times[name].append(seconds(work, device))
    return {name: statistics.median(values) for name, values in times.items()}


def machine_limits(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per second of a large copy and operations per second of a large matmul, here.

    The matmul is in `dtype` on a GPU, in fp32 on a CPU, where the kernel computes in fp32 always.
    """
    n = 1 << (28 if device.type == "cuda" else 25)
    source = torch.ones(n, device=device)
    target = torch.empty_like(source)
    side = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device).unbind()
    if device.type == "cuda":
        a, b = a.to(dtype), b.to(dtype)
    works = {"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}
    found = medians(works, device, budget=1.0)
    return {"bytes": 2 * 4 * n / found["copy"], "flops": 2 * side**3 / found["matmul"]}


def processor_name(device: torch.device) -> str:
    """What the machine calls its GPU, or its processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def make_inputs(
    operator: str, shape: list[int], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """The operator's inputs, the state last, with the decays of a trained model."""
    B, T, H, N = shape
    torch.manual_seed(0)
    r, k, v, w, a, b = torch.randn(6, B, T, H, N, device=device).unbind()
    u, state = torch.randn(H, N, device=device), torch.randn(B, H, N, N, device=device)
    if operator == "wkv6":
        w = torch.linspace(-6, 1, N, device=device) + 0.5 * w
        tensors = [*(x.to(dtype) for x in (r, k, v, w)), u, state]
    else:
        w, removed = -softplus(-w) - 0.5, normalize(a, dim=-1)
        rows = (r, k, v, w, -removed, removed * torch.sigmoid(b))
        tensors = [*(x.to(dtype) for x in rows), state]
    return [x.requires_grad_() for x in tensors]


def cost(operator: str, shape: list[int], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Bytes and operations of the recurrence. A token multiplies and adds so often with each
    element of the state: WKV6 twice, and five times in backward; WKV7 five and fourteen times.
    """
    B, T, H, N = shape
    tokens, state = B * T * H * N * dtype.itemsize, B * H * N * N * 4
    rows, forward, backward = (4, 2, 5) if operator == "wkv6" else (6, 5, 14)
    each = 2 * B * T * H * N * N
    return {
        "forward": {"bytes": (rows + 1) * tokens + 2 * state, "flops": forward * each},
        "forward+backward": {
            # The rows are read twice and y written; dy is read and the gradients written.
            "bytes": (3 * rows + 2) * tokens + 4 * state,
            "flops": (forward + backward) * each,
        },
    }


@functools.cache
def compiled_sequential_kernels() -> ctypes.CDLL:
    """sequential_wkv6.cu for the GPU of this machine."""
    nvcc = find_toolkit().nvcc
    source = Path(__file__).with_name("sequential_wkv6.cu")
    library = Path(tempfile.mkdtemp()) / "sequential_wkv6.so"
    flags = ["-O3", "-std=c++17", "-arch=native", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run([nvcc, *flags, f"-I{build.SOURCE_FOLDER}", source, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def forms_for(
    operator: str, shape: list[int], dtype: torch.dtype, device: torch.device
) -> dict[str, Form]:
    """The forms worth timing at this shape."""
    kernel, chunked, recurrence, triton = OPERATORS[operator]
    forms = {"kernel": kernel}
    if math.prod(shape) <= CHUNKED_LIMIT:
        forms["chunked torch"] = chunked
    if shape[1] <= RECURRENCE_LIMIT:
        forms["recurrence"] = recurrence
    if device.type == "cuda":
        if operator == "wkv6" and shape[3] == 64 and dtype != torch.float16:
            forms["sequential"] = sequential_form(compiled_sequential_kernels())
        if fits_triton(torch.empty(0, dtype=dtype, device=device)):
            forms["fla"] = triton
    return forms


def forward_only(form: Form, inputs: list[Tensor]) -> Callable[[], object]:
    def work() -> None:
        with torch.no_grad():
            form(*inputs)

    return work


def with_backward(form: Form, inputs: list[Tensor]) -> Callable[[], object]:
    y, state = (torch.randn_like(x) for x in form(*inputs))

    def work() -> None:
        torch.autograd.grad(form(*inputs), inputs, (y, state))

    return work


def measure(
    shape: list[int], dtype: torch.dtype, device: torch.device, args: argparse.Namespace
) -> dict:
    """Median milliseconds of every form and pass at one shape."""
    inputs = make_inputs(args.operator, shape, dtype, device)
    forms = forms_for(args.operator, shape, dtype, device)
    passes = {"forward": forward_only, "forward+backward": with_backward}
    works = {name: {f: make(x, inputs) for f, x in forms.items()} for name, make in passes.items()}
    return {name: medians(work, device, args.seconds, args.cold) for name, work in works.items()}


def rows(
    operator: str, shape: list[int], dtype_name: str, found: dict, limits: dict[str, float]
) -> list[dict]:
    """One record for each form and pass, ready to print."""
    records = []
    for name, times in found.items():
        spent = cost(operator, shape, DTYPES[dtype_name])[name]
        ideal = max(spent["bytes"] / limits["bytes"], spent["flops"] / limits["flops"])
        for form, t in times.items():
            records.append(
                {
                    "operator": operator,
                    "shape": shape,
                    "dtype": dtype_name,
                    "pass": name,
                    "form": form,
                    "ms": t * 1e3,
                    "times_slower_than_kernel": t / times["kernel"],
                    "gb_per_s": spent["bytes"] / t / 1e9,
                    "gflop_per_s": spent["flops"] / t / 1e9,
                    "of_bound": ideal / t,
                }
            )
    return records


def print_rows(records: list[dict]) -> None:
    for x in records:
        shape = "B{} T{} H{} N{}".format(*x["shape"])
        print(
            f"{shape:20} {x['dtype']:5} {x['pass']:17} {x['form']:14} {x['ms']:10.3f} "
            f"{x['times_slower_than_kernel']:9.1f} {x['gb_per_s']:8.1f} {x['gflop_per_s']:9.1f} "
            f"{x['of_bound']:8.1%}",
            flush=True,
        )


def parse_shape(text: str) -> list[int]:
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise UserError(f"--shapes: {text!r} is not B,T,H,N, as in 2,512,8,64")
    return [int(size) for size in sizes]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    gpu = torch.cuda.is_available()
    parser.add_argument("--operator", choices=OPERATORS, default="wkv6")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="cuda or cpu")
    parser.add_argument("--shapes", nargs="+", help="B,T,H,N; several may be given")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="spent on each pass of a shape")
    parser.add_argument("--cold", action="store_true", help="no uncounted call before each")
    parser.add_argument("--json", help="also write all numbers to this file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    device = torch.device(args.device)
    shapes = args.shapes or (GPU_SHAPES if device.type == "cuda" else CPU_SHAPES)
    parsed = [parse_shape(text) for text in shapes]
    torch.set_num_threads(args.threads)
    # Made and freed at once: the C library then keeps freed memory of up to this size for what
    # comes next, as in a process that trains, where the loss makes and frees such tensors.
    torch.empty(31 << 20, dtype=torch.uint8)
    limits = {dtype: machine_limits(device, DTYPES[dtype]) for dtype in args.dtypes}
    about = {"device": args.device, "threads": args.threads, "torch": torch.__version__}
    about |= {"processor": processor_name(device), "limits": limits}
    if device.type == "cpu" and has_kernels("cpu"):
        about["cpu_path"] = cpu_paths()[0]
    print(about["processor"])
    for dtype, limit in limits.items():
        copy, matmul = limit["bytes"] / 1e9, limit["flops"] / 1e9
        print(f"limits of {dtype}: copy {copy:.1f} GB/s, matmul {matmul:.0f} GFLOP/s")
    print(f"{'shape':20} {'dtype':5} {'pass':17} {'form':14} {'median ms':>10} {'x kernel':>9} "
          f"{'GB/s':>8} {'GFLOP/s':>9} {'of bound':>8}")  # fmt: skip
    records = []
    for shape in parsed:
        for dtype in args.dtypes:
            found = measure(shape, DTYPES[dtype], device, args)
            records += rows(args.operator, shape, dtype, found, limits[dtype])
            print_rows(records[-sum(map(len, found.values())) :])
            if args.json:  # now, since the run may be cut off
                write_json(args.json, {"machine": about, "results": records})


if __name__ == "__main__":
    run_cli(main)
