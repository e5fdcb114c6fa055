"""train.py killed and interrupted at any moment: what it says, and that nothing is lost."""

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import torch
from helpers.additions import flags, make_folder
from helpers.support import children_of, is_alive, metrics, script_command, train

from finchtune.errors import INTERRUPTED, LOST_RANK
from finchtune.files import sha256

BONE = "--peft bone --bone_r 8".split()
ONE, TWO = "--micro_bsz 4".split(), "--micro_bsz 2 --devices 2".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("interrupted"))


def start(*arguments, launcher=(), **environment):
    """Start train.py in the background, its output in pipes."""
    command, env = script_command("train.py", *arguments, launcher=launcher)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env | environment, start_new_session=True, **pipes)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def steps_done(proj):
    path = proj / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def final_state(proj):
    """Hashes of the last checkpoint and of the trained weights."""
    newest = max((proj / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    return newest.name, sha256(newest / "state.pth"), sha256(proj / "rwkv-0.pth")


def interrupt(process, number, proj, whom="all"):
    wait_for(lambda: steps_done(proj) >= 3, process)
    ranks = children_of(process.pid)
    os.kill(ranks[-1] if whom == "last rank" else process.pid, number)
    return process.communicate(timeout=120)


@pytest.mark.slow
def test_a_signal_saves_and_resuming_ends_like_no_signal(folder):
    """Also: metrics continue without a gap or a repetition, and a finished run says that it is."""
    words = [*BONE, *ONE, "--epoch_steps", 60]
    train(*flags(folder, "whole", *words, "--save_every", 60))
    process = start(*flags(folder, "stopped", *words))
    out, err = interrupt(process, signal.SIGTERM, folder / "stopped")
    assert process.returncode == INTERRUPTED, out + err
    assert "SIGTERM: stopping after this step" in err
    assert "resume with --resume auto" in out
    done = train(*flags(folder, "stopped", *words, "--save_every", 60, "--resume", "auto"))
    assert "resumed from" in done.stdout
    assert final_state(folder / "stopped") == final_state(folder / "whole")
    rows, expected = metrics(folder / "stopped"), metrics(folder / "whole")
    assert [(row["step"], row["loss"]) for row in rows] == [
        (row["step"], row["loss"]) for row in expected
    ]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["all", "last rank"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ranks_agree_to_stop(folder, number, whom):
    proj = f"agree-{number}-{whom}"
    process = start(*flags(folder, proj, *BONE, *TWO, "--epoch_steps", 5000))
    out, err = interrupt(process, number, folder / proj, whom)
    assert process.returncode == INTERRUPTED, out + err
    (checkpoint,) = (folder / proj / "checkpoints").iterdir()
    assert int(checkpoint.name[5:]) == metrics(folder / proj)[-1]["step"]


@pytest.mark.slow
def test_torchrun_passes_a_signal_on(folder):
    arguments = flags(folder, "torchrun", *BONE, "--micro_bsz", 2, "--epoch_steps", 5000)
    process = start(*arguments, launcher=AGENTS["torchrun"])
    out, err = interrupt(process, signal.SIGTERM, folder / "torchrun")
    assert process.returncode != 0
    assert "saved; resume with --resume auto" in out, out + err
    assert len(list((folder / "torchrun" / "checkpoints").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("whom", [0, 1])
def test_a_killed_rank_is_named(folder, whom):
    proj = f"killed-{whom}"
    process = start(*flags(folder, proj, *BONE, *TWO, "--epoch_steps", 5000))
    wait_for(lambda: steps_done(folder / proj) >= 3, process)
    os.kill(children_of(process.pid)[whom], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode == LOST_RANK, out + err
    assert f"lost rank {whom} of 2" in err
    assert f"rank {whom} was ended by SIGKILL" in err


AGENTS = {
    "train.py": [],
    "torchrun": "-m torch.distributed.run --standalone --nproc_per_node 2".split(),
    "deepspeed": "-m deepspeed.launcher.runner --num_gpus 2 --master_port 29678".split(),
}


def alive_after(seconds: float, pids: list[int]) -> list[int]:
    """Those processes that still run when so much time has passed; at once when there are none."""
    deadline = time.monotonic() + seconds
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if is_alive(pid)]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", "training"])
@pytest.mark.parametrize("launcher", AGENTS)
def test_no_rank_outlives_a_killed_launcher(folder, launcher, moment):
    """Also where the launcher dies before its ranks have so much as imported torch."""
    proj = f"orphans-{launcher}-{moment}"
    words = [*BONE, "--micro_bsz", 2, "--epoch_steps", 50000]
    words += [] if AGENTS[launcher] else ["--devices", 2]
    process = start(*flags(folder, proj, *words), launcher=AGENTS[launcher], DS_ACCELERATOR="cpu")

    def agent():  # DeepSpeed's runner starts the process that starts the ranks
        return children_of(process.pid)[0] if launcher == "deepspeed" else process.pid

    wait_for(lambda: children_of(process.pid) and len(children_of(agent())) == 2, process)
    if moment == "training":
        wait_for(lambda: steps_done(folder / proj) >= 3, process)
    ranks = children_of(agent())
    os.kill(agent(), signal.SIGKILL)
    left = alive_after(2 if moment == "training" else 30, ranks)
    for rank in left:
        os.kill(rank, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_stops_when_deepspeeds_runner_is_killed(folder, number):
    """Its agent continues and would never know."""
    proj = f"runner-{number}"
    arguments = flags(folder, proj, *BONE, "--micro_bsz", 2, "--epoch_steps", 50000)
    process = start(*arguments, launcher=AGENTS["deepspeed"], DS_ACCELERATOR="cpu")
    wait_for(lambda: steps_done(folder / proj) >= 3, process)
    (agent,) = children_of(process.pid)
    started = [agent, *children_of(agent)]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert "saved; resume with --resume auto" in out, out + err
    assert len(list((folder / proj / "checkpoints").iterdir())) == 1
    assert not alive_after(30, started)  # a process closes its output before it ends


@pytest.mark.slow
def test_a_hung_rank_is_named_after_the_timeout(folder):
    words = [*BONE, *TWO, "--epoch_steps", 5000, "--timeout_minutes", 0.1]
    process = start(*flags(folder, "hung", *words))
    wait_for(lambda: steps_done(folder / "hung") >= 3, process)
    os.kill(children_of(process.pid)[1], signal.SIGSTOP)
    began = time.monotonic()
    out, err = process.communicate(timeout=90)
    assert process.returncode == LOST_RANK, out + err
    assert "lost rank 1 of 2" in err
    assert time.monotonic() - began > 4


METHODS = {"bone": BONE, "full": []}
RESUMES = [
    (method, precision, processes)
    for method in METHODS
    for precision in ("fp32", "bf16")
    for processes in (1, 2)
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision", "processes"), RESUMES)
def test_n_is_k_and_n_minus_k(folder, method, precision, processes):
    """Equal sha256 of weights and optimizer, and checkpoints that hold fp32 master weights."""
    proj = folder / f"n-{method}-{precision}-{processes}"
    words = [*METHODS[method], *(ONE if processes == 1 else TWO), "--precision", precision]
    words += ["--epoch_steps", 9, "--save_every", 4, "--grad_cp", 1]
    train(*flags(folder, proj.name, *words))
    whole = final_state(proj)
    state = torch.load(proj / "checkpoints/step-4/state.pth", weights_only=True)
    assert {t.dtype for t in state["trained"].values()} == {torch.float32}
    for step in (8, 9):
        shutil.rmtree(proj / "checkpoints" / f"step-{step}")
    (proj / "rwkv-0.pth").unlink()
    done = train(*flags(folder, proj.name, *words, "--resume", "auto"))
    assert "step-4 at step 4" in done.stdout
    assert final_state(proj) == whole


KILLS = 32


def live_and_die(folder, proj, words, lives, seed):
    """Start a run `lives` times and kill it each time: in its start-up, in a step, or in a save."""
    rng = random.Random(seed)
    saving = 0
    for life in range(lives):
        process = start(*flags(folder, proj.name, *words, "--resume", "auto"))
        before, kind = steps_done(proj), life % 4
        if kind == 0:
            time.sleep(rng.uniform(0.5, 4))
        else:
            target = before + rng.randrange(1, 5)
            wait_for(lambda: steps_done(proj) >= target, process)  # noqa: B023
        if kind == 3:
            wait_for(lambda: list((proj / "checkpoints").glob(".step-*.tmp")), process)
            saving += 1
        else:
            time.sleep(rng.uniform(0, 0.05))
        assert process.poll() is None, process.communicate()
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return saving


@pytest.mark.slow
@pytest.mark.parametrize("more", [ONE, TWO], ids=["one process", "two processes"])
def test_killed_at_any_moment_it_ends_like_an_uninterrupted_run(folder, more):
    """At least 30 kills in both cases together, a quarter of them while a checkpoint is written."""
    proj, whole = folder / f"mortal-{len(more)}", folder / f"immortal-{len(more)}"
    words = [*BONE, *more, "--epoch_steps", 150, "--keep_last", 2]
    train(*flags(folder, whole.name, *words, "--save_every", 150))
    every = [*words, "--save_every", 1]
    assert live_and_die(folder, proj, every, KILLS // 2, seed=len(more)) >= KILLS // 8
    train(*flags(folder, proj.name, *every, "--resume", "auto"))
    assert final_state(proj) == final_state(whole)
    assert [row["loss"] for row in metrics(proj)] == [row["loss"] for row in metrics(whole)]
    assert sorted(p.name for p in (proj / "checkpoints").iterdir()) == ["step-149", "step-150"]
