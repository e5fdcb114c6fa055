"""train.py without good numbers, memory or room on the disk."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from helpers.additions import flags, make_folder
from helpers.support import metrics, run_script, save_model, small_model, train

from finchtune.errors import NOT_FINITE, OUT_OF_MEMORY
from finchtune.training.checkpoints import checkpoint_problem, checkpoints

pytestmark = pytest.mark.slow
BONE = "--peft bone --bone_r 8".split()
ONE, TWO = "--micro_bsz 4".split(), "--micro_bsz 2 --devices 2".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Also a model that one byte spoils every number of, and corpora with that byte in them."""
    path = make_folder(tmp_path_factory.mktemp("starved"))
    model = small_model(head_size=16)
    with torch.no_grad():
        model.emb.weight[ord("~")] = 3e38  # the mean of such numbers is infinite
    save_model(model, path / "spoilt.pth")
    good = (path / "text.jsonl").read_text().splitlines(keepends=True)
    (path / "one_bad.jsonl").write_text("".join(good[:-1]) + '{"text": "~"}\n')
    (path / "bad.jsonl").write_text('{"text": "~~"}\n' * 8)
    return path


@pytest.mark.parametrize("more", [ONE, TWO])
def test_bad_documents_are_skipped_and_named(folder, more):
    proj = f"skips-{len(more)}"
    words = [*BONE, *more, "--epoch_steps", 20]
    done = train(*flags(folder, proj, *words, base="spoilt.pth", data="one_bad.jsonl"))
    rows = [json.loads(line) for line in (folder / proj / "skipped.jsonl").open()]
    assert rows
    assert all(39 in row["documents"] for row in rows)
    assert len(rows) + len(metrics(folder / proj)) == 20
    assert f"step {rows[0]['step']} is skipped" in done.stdout
    tensors = torch.load(folder / proj / "rwkv-0.pth", weights_only=True)
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def test_nothing_but_bad_documents_stops_the_run(folder):
    words = [*BONE, *TWO, "--epoch_steps", 20, "--save_every", 1, "--max_skips", 2]
    done = run_script(
        "train.py", *flags(folder, "bad", *words, base="spoilt.pth", data="bad.jsonl")
    )
    assert done.returncode == NOT_FINITE, done.stdout + done.stderr
    assert done.stderr.count("error: 2 steps in a row had NaN") == 1
    assert [p.name for p in (folder / "bad" / "checkpoints").iterdir()] == ["step-1"]


LIMITED = """
import resource, runpy, sys
import torch, finchtune.training.engine, deepspeed, finchtune.training.plan
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


IN_TWO = f"""
import sys
from finchtune.distributed.launch import run_processes
sys.exit(run_processes(2, ["-c", {LIMITED!r}, *sys.argv[1:]]))
"""


@pytest.mark.parametrize("program", [LIMITED, IN_TWO], ids=["one process", "two processes"])
def test_no_memory_is_told_once_with_remedies(folder, program):
    big = small_model(n_layer=1, n_embd=512, head_size=64)
    save_model(big, folder / "big.pth")
    text = json.dumps({"text": "memory " * 1000})
    (folder / "long.jsonl").write_text(f"{text}\n" * 64)
    words = ["--micro_bsz", 64, "--ctx_len", 4096, "--grad_cp", 0, "--accelerator", "cpu"]
    arguments = flags(folder, f"oom-{len(program)}", *words, base="big.pth", data="long.jsonl")
    done = run_script("train.py", *arguments, launcher=["-c", program])
    assert done.returncode == OUT_OF_MEMORY, done.stdout + done.stderr
    for part in (
        "error: out of memory on rank",
        "MiB are estimated",
        "--micro_bsz 32 --accumulate_grad_batches 2",
    ):
        assert done.stderr.count(part) == 1, done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("more", [ONE, TWO], ids=["one process", "two processes"])
def test_a_disk_that_fills_up_keeps_the_earlier_checkpoints(folder, more):
    small = folder / f"small-{len(more)}"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        words = [*BONE, *more, "--epoch_steps", 200, "--save_every", 1]
        done = run_script("train.py", *flags(folder, small / "run", *words))
        assert done.returncode == 2, done.stdout + done.stderr
        assert "MB are free" in done.stderr or "the disk is full" in done.stderr
        assert done.stderr.count("error: ") == 1
        saved = checkpoints(small / "run" / "checkpoints")
        assert all(checkpoint_problem(path) is None for path in saved)
        for path in saved[1:]:  # make room
            shutil.rmtree(path)
        train(*flags(folder, small / "run", *words[:-4], "--epoch_steps", 200, "--save_every", 50,
                     "--keep_last", 1, "--resume", "auto"))  # fmt: skip
        assert [p.name for p in (small / "run" / "checkpoints").iterdir()] == ["step-200"]
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
