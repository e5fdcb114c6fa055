"""The scripts for several machines: two hosts made of network namespaces, and a stand-in SLURM."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.support import (
    REPOSITORY,
    children_of,
    is_alive,
    metrics,
    save_model,
    small_model,
    train,
)

from finchtune.files import sha256

pytestmark = pytest.mark.slow
WORDS = "--peft bone --bone_r 8 --epoch_steps 4 --micro_bsz 2".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("machines")
    save_model(small_model(head_size=16), path / "base.pth")
    (path / "text.jsonl").write_text("".join(f'{{"text": "{n} and {n} more"}}\n' for n in range(9)))
    return path


def flags(folder, proj, *more):
    words = ["--load_model", folder / "base.pth", "--data_file", folder / "text.jsonl"]
    words += ["--data_type", "jsonl", "--ctx_len", 32, "--lr_init", 1e-2, *WORDS]
    return [*map(str, [*words, "--proj_dir", folder / proj, *more])]


@pytest.fixture(scope="module")
def hosts():
    """Two network namespaces, joined by a cable: name -> address."""
    hosts = {"finchtune-a": "10.77.0.1", "finchtune-b": "10.77.0.2"}

    def ip(words):
        return subprocess.run(["ip", *words.split()], capture_output=True, text=True)

    def remove():
        for host in hosts:
            ip(f"netns del {host}")

    remove()
    for host in hosts:
        made = ip(f"netns add {host}")
        if made.returncode:
            pytest.skip(f"this machine makes no network namespaces: {made.stderr.strip()}")
    cable = "link add name wire netns finchtune-a type veth peer name wire netns finchtune-b"
    steps = [cable] + [
        f"-n {host} {words}"
        for host, address in hosts.items()
        for words in (f"addr add {address}/24 dev wire", "link set wire up", "link set lo up")
    ]
    for step in steps:
        done = ip(step)
        if done.returncode:
            remove()
            pytest.skip(f"this machine joins no network namespaces: {done.stderr.strip()}")
    yield hosts
    remove()


def on_every_host(hosts, arguments, **settings):
    """Start run_multinode.sh on both hosts."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": "wire", "PATH": python_first()} | settings
    env |= {"NODES": "2", "GPUS": "1", "HOST": hosts["finchtune-a"], "OMP_NUM_THREADS": "1"}
    script = ["bash", str(REPOSITORY / "scripts" / "run_multinode.sh"), *arguments]
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *script],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in hosts
    ]


def python_first():
    """PATH on which `python` is this one."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


@pytest.mark.parametrize("strategy", ["deepspeed_stage_2", "deepspeed_stage_3_offload"])
def test_two_hosts_give_the_losses_of_one_process(folder, hosts, strategy):
    train(*flags(folder, "one", "--micro_bsz", 4, "--overwrite", 1))
    arguments = flags(folder, strategy, "--num_nodes", 2, "--strategy", strategy)
    processes = on_every_host(hosts, arguments)
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    found = [row["loss"] for row in metrics(folder / strategy)]
    assert found == pytest.approx([row["loss"] for row in metrics(folder / "one")], rel=1e-5)


def test_a_signal_on_one_host_saves_and_ends_both(folder, hosts):
    arguments = flags(folder, "signal", "--epoch_steps", 5000, "--num_nodes", 2)
    processes = on_every_host(hosts, arguments)
    wait_for_steps(folder / "signal" / "metrics.jsonl", 3)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert all(process.returncode for process in processes)
    assert any("saved; resume with --resume auto" in output for output in outputs), outputs
    (checkpoint,) = (folder / "signal" / "checkpoints").iterdir()
    state = torch.load(checkpoint / "state.pth", weights_only=True)
    assert f"step-{state['adam_step']}" == checkpoint.name


def rank_under(process):
    """The rank that torchrun started, which took the place of the script.

    Of the children, the script's own have ended.
    """
    (rank,) = [child for child in children_of(process.pid) if is_alive(child)]
    return rank


def wait_for_steps(path, n_steps):
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < n_steps:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_dead_rank_is_started_again_and_the_run_ends_like_one_without_it(folder, hosts):
    """RESTARTS: every rank starts anew and resumes from the newest checkpoint."""
    words = ["--epoch_steps", 150, "--num_nodes", 2]
    outputs = []
    for proj in ("undisturbed", "restarted"):
        arguments = flags(folder, proj, *words, "--save_every", 1, "--keep_last", 2)
        arguments += ["--resume", "auto"]
        processes = on_every_host(hosts, arguments, RESTARTS="2")
        if proj == "restarted":
            wait_for_steps(folder / proj / "metrics.jsonl", 5)
            os.kill(rank_under(processes[1]), signal.SIGKILL)
        outputs = [process.communicate(timeout=250)[0] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
    assert any("resumed from" in output for output in outputs), outputs
    expected, found = (metrics(folder / proj) for proj in ("undisturbed", "restarted"))
    assert [(r["step"], r["loss"]) for r in found] == [(r["step"], r["loss"]) for r in expected]
    hashes = [sha256(folder / proj / "rwkv-0.pth") for proj in ("undisturbed", "restarted")]
    assert hashes[0] == hashes[1]


def test_ranks_die_with_the_agent_of_their_machine(folder, hosts):
    processes = on_every_host(
        hosts, flags(folder, "agent", "--epoch_steps", 5000, "--num_nodes", 2)
    )
    wait_for_steps(folder / "agent" / "metrics.jsonl", 3)
    ranks = [rank_under(process) for process in processes]
    processes[1].kill()
    deadline = time.monotonic() + 60
    while any(is_alive(rank) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(rank) for rank in ranks)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert processes[0].returncode, outputs
    assert "lost rank" in outputs[0], outputs


SRUN = """#!/usr/bin/env bash
# One task per processor, as SLURM starts them; the highest exit status is the step's.
while [[ "$1" == --* ]]; do shift; done
status=0
for id in 0 1; do
    SLURM_PROCID=$id SLURM_LOCALID=$id SLURM_NTASKS=2 "$@" &
    echo $! >> "$TASKS"
    tasks[id]=$!
done
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


def test_slurm_queues_an_interrupted_job_again(folder):
    tools = folder / "slurm"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tools}:{python_first()}", "SLURM_JOB_ID": str(os.getpid())}
    env |= {"SLURM_JOB_NODELIST": "here", "OMP_NUM_THREADS": "1", "TASKS": str(tools / "tasks")}
    env |= {"REQUEUED": str(tools / "requeued")}

    def job(steps):
        arguments = flags(folder, "job", "--epoch_steps", steps, "--save_every", 1000)
        script = ["bash", "scripts/run_slurm.sh", *arguments]
        return subprocess.Popen(script, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, text=True)

    first = job(600)
    wait_for_steps(folder / "job" / "metrics.jsonl", 3)
    for task in (tools / "tasks").read_text().split():
        os.kill(int(task), signal.SIGTERM)
    first.send_signal(signal.SIGTERM)
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 75, out
    assert (tools / "requeued").read_text() == f"requeue {os.getpid()}\n"
    second = job(600)
    out, _ = second.communicate(timeout=200)
    assert second.returncode == 0, out
    assert "resumed from" in out
    assert [row["step"] for row in metrics(folder / "job")] == list(range(1, 601))
