"""Two programs on the same cores: neither may starve the other by spinning at barriers."""

import os
import statistics
import subprocess

import pytest
from helpers.support import metrics, save_model, script_command, small_model

STEPS = 12


@pytest.mark.slow
def test_two_runs_at_once_take_at_most_two_and_a_half_times_as_long(tmp_path):
    save_model(small_model(n_layer=8, n_embd=128), tmp_path / "base.pth")
    (tmp_path / "d.jsonl").write_text('{"text": "%s"}\n' % ("ten little words " * 40) * 60)

    def start(name):
        command, environment = script_command(
            "train.py",
            *("--load_model", tmp_path / "base.pth", "--data_file", tmp_path / "d.jsonl"),
            *"--data_type jsonl --tokenizer bytes --ctx_len 256 --micro_bsz 4".split(),
            *("--epoch_steps", STEPS, "--proj_dir", tmp_path / name),
        )
        environment.pop("OMP_NUM_THREADS", None)
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)

    def step_seconds(*names):
        processes = [start(name) for name in names]
        assert [process.wait() for process in processes] == [0] * len(names)
        rows = [row["seconds"] for name in names for row in metrics(tmp_path / name)]
        return statistics.mean(rows)

    alone, together = step_seconds("alone"), step_seconds("first", "second")
    print(f"{os.cpu_count()} cores: {alone:.3f} s a step alone, {together:.3f} s of two at once")
    assert together <= 2.5 * alone
