"""Cases of a system that refuses, and of command lines that make no sense."""

import ctypes
import os
import random
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from changes import VALUES
from harness import EITHER, READ, REFUSED, Case, limit_memory
from samples import TRAIN

Prepare = Callable[[], object]
CAPABILITIES = struct.pack("Ii", 0x20080522, 0)  # linux/capability.h, version 3, this process
ESCAPE = "\x1b]0;taken\x07\x1b[31m"
WRITERS: dict[str, tuple[str, ...]] = {
    "train": (*TRAIN[:-1], "new"),
    "merge": (
        *("merge", "--base_model", "base.pth", "--peft_checkpoint", "rwkv-0.pth"),
        *("--output", "new/out.pth"),
    ),
    "convert": ("convert", "--input", "rwkv-0.pth", "--output", "new/peft"),
    "export": ("export", "--model", "base.pth", "--to", "gguf", "--output", "new/out.gguf"),
    "prepare": (
        *("prepare", "--input", "qa.jsonl", "--output", "new/data", "--tokenizer"),
        *("bytes", "--workers", "1", "--sft_field", "question", "answer"),
    ),
    "init": (
        *("init", "--n_layer", "1", "--n_embd", "64", "--vocab_size", "256"),
        *("--output", "new/out.pth"),
    ),
    "report": ("report", "run", "--output", "new/page.html"),
    "unmerge": (
        *("unmerge", "--merged_model", "merged.pth", "--peft_checkpoint", "rwkv-0.pth"),
        *("--output", "new/out.pth"),
    ),
    "evaluate": (
        *("evaluate", "--task", "gsm8k", "--data", "qa.jsonl", "--model", "base.pth"),
        *("--tokens", "2", "--output", "new/scored"),
    ),
}
"""A command that writes into the folder `new`, which is there, empty."""
READERS: dict[str, tuple[str, ...]] = {
    "info": ("info", "base.pth"),
    "inspect": ("inspect", "--data_file", "data"),
    "generate": ("generate", "--model", "base.pth", "--prompt", "1", "--tokens", "2"),
    "plan": ("plan", "--config", "flags.yaml"),
}
ALL = WRITERS | READERS


def new_folder(folder: Path) -> None:
    (folder / "new").mkdir()


def without_rights() -> None:
    """Also root's process is then held to what a folder's mode says."""
    assert ctypes.CDLL(None).capset(CAPABILITIES, bytes(24)) == 0


def read_only(folder: Path) -> None:
    """Nothing can be written into `new`."""
    new_folder(folder)
    (folder / "new").chmod(0o555)


def unreadable(folder: Path) -> None:
    """None of the files can be read."""
    new_folder(folder)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0)


def small_files(n_bytes: int) -> Prepare:
    """No file may become larger, as on a full disk."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))

    return prepare


def few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 2,) * 2)


def full_output() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def closed_output() -> None:
    sys.stdout = None  # what Python makes of a descriptor that was closed before it began


def narrow_output() -> None:
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def without_place() -> None:
    """The folder that the process is in is removed."""
    os.mkdir("gone")
    os.chdir("gone")
    os.rmdir("../gone")


def environment(**values: str | None) -> Prepare:
    """Variables with other values, or (None) without any."""

    def prepare() -> None:
        for name, value in values.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value

    return prepare


def refusals(rng: random.Random, n: int) -> Iterator[Case]:
    """Rights, disks, memory, descriptors and output that are missing."""
    for verb, command in WRITERS.items():
        yield Case("read-only folder", verb, read_only, command, REFUSED, prepare=without_rights)
        for size in (0, 100, rng.randrange(200, 4000), rng.randrange(4000, 150_000)):
            limit = small_files(size)
            yield Case("full disk", f"{verb}, {size} bytes", new_folder, command, EITHER,
                       prepare=limit)  # fmt: skip
    for verb, command in ALL.items():
        if verb not in ("init",):
            yield Case("unreadable files", verb, unreadable, command, EITHER,
                       prepare=without_rights)  # fmt: skip
        for megabytes in (100, rng.randrange(100, 600)):
            yield Case("little memory", f"{verb}, {megabytes} MB", new_folder, command, EITHER,
                       prepare=lambda m=megabytes: limit_memory(m << 20))  # fmt: skip
        yield Case("few descriptors", verb, new_folder, command, EITHER, prepare=few_files)
        yield Case("output: full", verb, new_folder, command, EITHER, prepare=full_output)
        yield Case("output: closed", verb, new_folder, command, EITHER, prepare=closed_output)
        yield Case("output: ASCII only", verb, new_folder, command, READ, prepare=narrow_output)
        yield Case("working folder removed", verb, new_folder, command, REFUSED,
                   prepare=without_place)  # fmt: skip


ENVIRONMENTS: tuple[tuple[dict[str, str | None], str], ...] = (
    ({"HOME": None}, READ),
    ({"HOME": "/proc/nowhere", "XDG_CACHE_HOME": None}, READ),
    ({"HOME": "/proc/nowhere", "XDG_CACHE_HOME": ""}, READ),
    ({"XDG_CACHE_HOME": "/proc/nowhere"}, READ),
    ({"TMPDIR": "/nonexistent"}, READ),
    ({"RANK": "x"}, REFUSED),
    ({"RANK": "-1"}, REFUSED),
    ({"RANK": "3"}, REFUSED),
    ({"RANK": "0", "LOCAL_RANK": "x"}, REFUSED),
    ({"RANK": "0", "WORLD_SIZE": "0"}, REFUSED),
    ({"RANK": "0", "WORLD_SIZE": "1e3"}, REFUSED),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "x"}, REFUSED),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": None}, REFUSED),
    ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_PORT": "99999"}, REFUSED),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "9", "MASTER_ADDR": None}, REFUSED),
    ({"OMP_NUM_THREADS": "x"}, READ),
    ({"CUDA_VISIBLE_DEVICES": "99"}, READ),
)


def environments(rng: random.Random, n: int) -> Iterator[Case]:
    """Variables that are missing or odd, for a run."""
    for values, wanted in ENVIRONMENTS:
        name = " ".join(f"{key}={value}" for key, value in values.items())
        yield Case("environment", name, new_folder, WRITERS["train"], wanted,
                   prepare=environment(**values))  # fmt: skip


NUMBERS: dict[str, tuple[str, ...]] = {
    "train": (
        *("devices", "num_nodes", "random_seed", "bone_r", "ctx_len", "micro_bsz", "epoch_steps"),
        *("epoch_count", "lr_init", "lr_final", "warmup_steps", "beta1", "adam_eps", "grad_cp"),
        *("weight_decay", "grad_clip", "l2wrap", "max_skips", "timeout_minutes", "save_every"),
        *("keep_last", "accumulate_grad_batches", "global_bsz", "chunk_ctx", "context_parallel"),
    ),
    "plan": ("devices", "ctx_len", "micro_bsz", "lora_r", "lora_alpha", "random_seed"),
    "init": ("n_layer", "n_embd", "vocab_size", "head_size_a", "dim_ffn", "seed"),
    "generate": (
        *("tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed"),
        *("presence_penalty", "frequency_penalty", "penalty_decay", "batch"),
    ),
    "inspect": ("vocab_size", "ctx_len", "samples", "random_seed"),
    "prepare": ("val_split", "workers"),
    "evaluate": ("limit", "shots", "tokens", "samples", "temperature"),
}
ODD_NUMBERS = (*map(str, (-1, 0, 2**64, 10**20, 2**31, -(2**63), 1.5)), "1e400", "nan", "-inf", "x")


def command_lines(rng: random.Random, n: int) -> Iterator[Case]:
    """Numbers out of any range, and words that command a terminal."""
    for verb, names in NUMBERS.items():
        for name in names:
            for value in rng.sample(ODD_NUMBERS, min(n, len(ODD_NUMBERS))):
                words = (*ALL[verb], f"--{name}", value)
                yield Case("numbers", f"{verb} --{name} {value}", new_folder, words)
    for verb, command in ALL.items():
        for i, word in enumerate(command):
            if i:
                words = (*command[:i], f"{word}{ESCAPE}", *command[i + 1 :])
                yield Case("escapes", f"{verb}: {word}", new_folder, words)
        yield Case(
            "escapes", f"{verb}: a flag", new_folder, (*command, f"--{ESCAPE}", "x"), REFUSED
        )
        for value in rng.sample([v for v in VALUES if isinstance(v, str) and "\0" not in v], 3):
            i = rng.randrange(1, len(command))
            words = (*command[:i], value, *command[i + 1 :])
            yield Case("words", f"{verb}: {value!r}", new_folder, words)
    yield Case("no GPU", "train", new_folder, (*WRITERS["train"], "--accelerator", "gpu"), REFUSED)
    for word in ("3B", "BlinkDL/rwkv-6-world", "https://huggingface.co/x/y"):
        words = tuple(word if one == "base.pth" else one for one in WRITERS["train"])
        yield Case("words", f"train --load_model {word}", new_folder, words, REFUSED)


FAULTS = (refusals, environments, command_lines)
