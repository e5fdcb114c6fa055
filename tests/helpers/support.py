"""What several tests need: small models, another runtime's logits, running train.py."""

import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import fork_server

from finchtune.models import LanguageModel, generation_of
from finchtune.models.generations import by_number
from finchtune.ops import kernels
from finchtune.weights.tensors import write_tensors

NUMBERS = by_number()
every_generation = pytest.mark.parametrize("generation", NUMBERS, ids="RWKV-{}".format)


def small_model(
    n_layer=2, n_embd=64, vocab_size=256, head_size=8, seed=0, generation=6, **sizes
) -> LanguageModel:
    """A model in which no tensor is zero or constant, so that no path is hidden."""
    made = NUMBERS[generation]
    config = made.sizes(n_layer, n_embd, vocab_size, head_size=head_size, **sizes)
    model = made.init_weights(made.model(config, 0), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * (0.1 if parameter.dim() < 3 else 0.2))
    return model


def save_model(model: LanguageModel, path: Path) -> Path:
    write_tensors(model.state_dict(), path)
    return path


def whole_state(engine) -> dict:
    """An engine's state with its tensors in it, as a checkpoint file holds it."""
    layout, tensors = engine.state()
    parts = {k: v for k, v in layout.items() if isinstance(v, dict) and k != "loss_scale"}
    filled = {k: {name: next(tensors) for name in part} for k, part in parts.items()}
    assert next(tensors, None) is None
    return layout | filled


def rwkv_package(path: Path):
    """The independent `rwkv` package's runtime of a .pth, on the CPU in fp32."""
    number = generation_of(torch.load(path, weights_only=True, mmap=True)).number
    os.environ["RWKV_V7_ON"] = str(int(number == 7))  # read when the module is imported
    os.environ["RWKV_JIT_ON"] = "0"
    sys.modules.pop("rwkv.model", None)
    from rwkv.model import RWKV

    gc.freeze()  # it collects garbage after every tensor, and a test process has much to look at
    try:
        if number == 7:
            return RWKV(str(path.with_suffix("")), "cpu fp32")
        return RWKV(str(path), "cpu fp32", verbose=False)
    finally:
        gc.unfreeze()


def rwkv_package_logits(path: Path, tokens: list[int]) -> torch.Tensor:
    """Logits (T, V) of the `rwkv` package."""
    logits, _ = rwkv_package(path).forward(list(tokens), None, full_output=True)
    return logits


def rwkv_package_greedy(path: Path, prompt: list[int], n: int) -> list[int]:
    """The `rwkv` package's likeliest `n` tokens after a prompt."""
    runtime, tokens = rwkv_package(path), []
    logits, state = runtime.forward(list(prompt), None)
    for _ in range(n):
        tokens.append(int(logits.argmax()))
        logits, state = runtime.forward(tokens[-1:], state)
    return tokens


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest deviation, relative to the largest expected magnitude."""
    found, expected = found.double(), expected.double()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def peak_bytes(work):
    """The peak of live tensor memory during `work`, by torch's own account."""
    with torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(nbytes for _, nbytes in changes))


REPOSITORY = Path(__file__).parents[2]


def script_command(script: str, *arguments, launcher=()) -> tuple[list[str], dict[str, str]]:
    """How to run a script of the repository with this Python: the command and its environment.

    `launcher` goes between Python and the script, e.g. -m torch.distributed.run.
    """
    command = [sys.executable, *launcher, str(REPOSITORY / script), *map(str, arguments)]
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return command, env


def run_script(script: str, *arguments, launcher=(), timeout: float = 300, **environment: str):
    """Run a script of the repository with this Python; returns the finished process.

    It is forked from a process that has imported torch, where that can make no difference.
    """
    command, env = script_command(script, *arguments, launcher=launcher)
    if not (launcher or environment or torch.cuda.is_available()):
        return fork_server.server().run(command[1:], env, timeout)
    return subprocess.run(
        command, env=env | environment, capture_output=True, text=True, timeout=timeout
    )


def children_of(pid: int) -> list[int]:
    """Ids of the processes that a process started and that still have it as their parent."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True)
    return [int(child) for child in found.stdout.split()]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet fetched by its parent does not."""
    stat = Path("/proc", str(pid), "stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def train(*arguments, **options):
    """Run train.py and insist that it succeeds."""
    done = run_script("train.py", *arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def assert_one_error_line(done, *parts: str) -> None:
    """The process failed as a user's mistake does: status 2, one `error:` line with `parts`."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in lines[0], lines[0]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def cpu_path_in_use(name: str) -> Iterator[None]:
    """Run the CPU kernels in one of their forms; skips where this processor has not got it."""
    if name not in kernels.cpu_paths():
        pytest.skip(f"this processor has no {name}")
    kernels.use_cpu_path(name)
    yield
    kernels.use_cpu_path("fastest")
