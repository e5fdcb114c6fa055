"""How fast is WKV6 here: the kernels against plain torch, and against what the machine can do.

    python scripts/bench/wkv.py                   # the shapes for this machine
    python scripts/bench/wkv.py --shapes 2,512,8,64 --dtypes fp32 --json out.json

For each shape B,T,H,N: the median time of a forward, and of a forward with backward, of the
recurrence in torch, of the chunked form in torch and of the kernel; on a GPU with a head size of
64 also of sequential kernels in the style of the official ones (sequential_wkv6.cu, compiled with
nvcc), and of flash-linear-attention's chunk_rwkv6 where it is installed. The times of all forms are
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

from finchtune.errors import UserError, run_cli
from finchtune.files import write_json
from finchtune.ops.kernels import build, cpu_paths, has_kernels
from finchtune.ops.kernels.toolkit import find_toolkit
from finchtune.ops.wkv6 import wkv6, wkv6_chunked, wkv6_reference
from finchtune.ops.wkv6.sequential import Form, sequential_form
from finchtune.ops.wkv6.triton import fits_triton, wkv6_triton

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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


def make_inputs(shape: list[int], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """r, k, v, w, u, state with the decays of a trained model."""
    B, T, H, N = shape
    torch.manual_seed(0)
    r, k, v, w = torch.randn(4, B, T, H, N, device=device).unbind()
    w = torch.linspace(-6, 1, N, device=device) + 0.5 * w
    u, state = torch.randn(H, N, device=device), torch.randn(B, H, N, N, device=device)
    tensors = [*(x.to(dtype) for x in (r, k, v, w)), u, state]
    return [x.requires_grad_() for x in tensors]


def cost(shape: list[int], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Bytes and operations of the recurrence; backward does the forward's sums and four others."""
    B, T, H, N = shape
    tokens, state = B * T * H * N * dtype.itemsize, B * H * N * N * 4
    return {
        "forward": {"bytes": 5 * tokens + 2 * state, "flops": 4 * B * T * H * N * N},
        "forward+backward": {
            # r, k, v, w are read twice and y written; dy is read and four gradients written.
            "bytes": 14 * tokens + 4 * state,
            "flops": 14 * B * T * H * N * N,
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


def forms_for(shape: list[int], dtype: torch.dtype, device: torch.device) -> dict[str, Form]:
    """The forms worth timing at this shape."""
    forms: dict[str, Form] = {"kernel": wkv6}
    if math.prod(shape) <= CHUNKED_LIMIT:
        forms["chunked torch"] = wkv6_chunked
    if shape[1] <= RECURRENCE_LIMIT:
        forms["recurrence"] = wkv6_reference
    if device.type == "cuda":
        if shape[3] == 64 and dtype != torch.float16:
            forms["sequential"] = sequential_form(compiled_sequential_kernels())
        if fits_triton(torch.empty(0, dtype=dtype, device=device)):
            forms["fla"] = wkv6_triton
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
    shape: list[int], dtype: torch.dtype, device: torch.device, budget: float, cold: bool
) -> dict:
    """Median milliseconds of every form and pass at one shape."""
    inputs = make_inputs(shape, dtype, device)
    forms = forms_for(shape, dtype, device)
    passes = {"forward": forward_only, "forward+backward": with_backward}
    return {
        name: medians({f: make(form, inputs) for f, form in forms.items()}, device, budget, cold)
        for name, make in passes.items()
    }


def rows(shape: list[int], dtype_name: str, found: dict, limits: dict[str, float]) -> list[dict]:
    """One record for each form and pass, ready to print."""
    records = []
    for name, times in found.items():
        spent = cost(shape, DTYPES[dtype_name])[name]
        ideal = max(spent["bytes"] / limits["bytes"], spent["flops"] / limits["flops"])
        for form, t in times.items():
            records.append(
                {
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
            found = measure(shape, DTYPES[dtype], device, args.seconds, args.cold)
            records += rows(shape, dtype, found, limits[dtype])
            print_rows(records[-sum(map(len, found.values())) :])
    if args.json:
        write_json(args.json, {"machine": about, "results": records})


if __name__ == "__main__":
    run_cli(main)
