"""Time and memory of merging Bone into a model of a released size, against a plain copy.

    python scripts/bench/merge.py --size 1.6B --repeats 3

Writes random bf16 weights and a Bone of rank 64 into a temporary folder, and there copies the file
and merges, alternately. Wants three times the model's size on the disk. For numbers that mean
something the machine has to be otherwise idle.
"""

import argparse
import os
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from finchtune.files import sha256
from finchtune.models import meta_model, released_sizes
from finchtune.weights.adapter_files import FORMAT, save_adapter
from finchtune.weights.pth import write_pth

MERGE = Path(__file__).parents[2] / "merge" / "merge.py"
LINEAR = re.compile(r"blocks\.\d+\.(att|ffn)\.(receptance|key|value|gate|output)\.weight")
RANK = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="1.6B", choices=sorted(released_sizes()))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", help="where to make the temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        base, adapter = Path(folder, "base.pth"), Path(folder, "adapter.pth")
        write_files(given.size, base, adapter)
        copies, synced, merges = [], [], []
        for _ in range(given.repeats):
            copies.append(timed(lambda: copy(base, sync=False)))
            synced.append(timed(lambda: copy(base, sync=True)))
            merges.append(timed(lambda: merge(base, adapter, Path(folder, "merged.pth"))))
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
        print(f"{given.size}, {base.stat().st_size / 1e9:.2f} GB")
        print(f"copy:  {shown(copies)}; until it is on the disk: {shown(synced)}")
        print(f"merge: {shown(merges)}, at most {memory:.2f} GB resident, mapped files included")
        print(multiples(merges, copies, synced))


def write_files(size: str, base: Path, adapter: Path) -> None:
    """Random weights of a released size, and a Bone for them."""
    layout = write_weights(size, base)
    tensors = {
        f"{name.removesuffix('.weight')}.bone": torch.randn(RANK, len(tensor)) * 1e-3
        for name, tensor in layout.items()
        if LINEAR.fullmatch(name)
    }
    record = {
        "format": FORMAT,
        "adapter": {"method": "bone", "r": RANK},
        "base": {"file": base.name, "sha256": sha256(base)},
    }
    save_adapter(tensors, record, adapter)


def write_weights(size: str, base: Path) -> dict[str, torch.Tensor]:
    """Random weights of a released size; returns their layout."""
    model = meta_model(released_sizes()[size])
    layout = {name: t.to("meta", torch.bfloat16) for name, t in model.state_dict().items()}
    weights = (torch.empty(t.shape, dtype=t.dtype).normal_(0, 0.02) for t in layout.values())
    write_pth(layout, weights, base)
    return layout


def merge(base: Path, adapter: Path, output: Path) -> None:
    flags = ["--base_model", base, "--peft_checkpoint", adapter, "--output", output]
    subprocess.run([sys.executable, MERGE, *flags], check=True, stdout=subprocess.DEVNULL)
    output.unlink()


def copy(file: Path, sync: bool) -> None:
    """Copy a file and remove the copy; `sync`: once it is on the disk."""
    target = file.with_name("copy")
    shutil.copyfile(file, target)
    if sync:
        with target.open("rb") as copied:
            os.fsync(copied.fileno())
    target.unlink()


def multiples(times: list[float], copies: list[float], synced: list[float]) -> str:
    """The median of `times` over those of copies, which a merge and an export write to the disk."""
    plain, full = (statistics.median(times) / statistics.median(x) for x in (copies, synced))
    return f"{plain:.1f} times a copy, {full:.1f} times one that is on the disk"


def timed(work) -> float:
    """Seconds that `work` takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def shown(times: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f})"


if __name__ == "__main__":
    main()
