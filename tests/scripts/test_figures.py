"""The scripts behind the figures of docs/paper.md, on a tiny model."""

import json
import random

import pytest
from helpers.support import REPOSITORY, save_model, small_model

from finchtune.files import read_json

FIELDS = ("question", "answer")


@pytest.fixture
def inputs(tmp_path):
    """--model and --data_file: a small RWKV-6 over bytes, and sums."""
    save_model(small_model(n_layer=1, n_embd=16), tmp_path / "base.pth")
    rng = random.Random(0)
    with (tmp_path / "sums.jsonl").open("w") as file:
        for _ in range(30):
            a, b = rng.randrange(10), rng.randrange(10)
            row = dict(zip(FIELDS, (f"What is {a} plus {b}?", f"It is {a + b}."), strict=True))
            file.write(json.dumps(row) + "\n")
    return ["--model", tmp_path / "base.pth", "--data_file", tmp_path / "sums.jsonl"]


class TestConvergence:
    SCRIPT = REPOSITORY / "scripts/paper/figure_convergence.py"

    @pytest.fixture
    def flags(self, inputs, tmp_path):
        words = "--steps 20 --micro_bsz 2 --ctx_len 16 --test_rows 4 --lrs 1e-3 1e-2 --seeds 3 4"
        test = ("--test_file", tmp_path / "sums.jsonl", "--out", tmp_path / "out")
        return [*inputs, *test, *words.split()]

    @pytest.mark.slow
    def test_runs_are_kept_and_drawn_once_all_are_there(self, flags, tmp_path, run):
        status, out, _ = run(*flags, "--methods", "bone", "lora")
        assert status == 0
        assert out.count("held out") == 2 * 3, "two rates with one seed, and the better with both"
        assert "runs of bat, pissa, olora are missing" in out
        status, out, _ = run(*flags)
        assert status == 0
        assert out.count(" s\n") == 3 * 3, "what was run is not run again"
        assert (tmp_path / "out/convergence.png").read_bytes().startswith(b"\x89PNG")
        runs = read_json(tmp_path / "out/convergence.json")["runs"]
        assert len(runs) == 15
        assert len({r["trained"] for r in runs}) == 1, "equal trainable parameters"
        bone = {(r["lr"], r["seed"]): r["losses"] for r in runs if r["method"] == "bone"}
        assert bone[0.01, 3][-1] < bone[0.01, 3][0]
        better = min((sum(bone[lr, 3][-20:]), lr) for lr in (0.001, 0.01))[1]
        assert (better, 4) in bone
        assert f"| bone | 1,152 | {better:g} |" in out

    def test_a_folder_of_other_settings_is_refused(self, flags, run):
        assert run(*flags, "--methods", "bone", "--grid_only")[0] == 0
        status, _, error = run(*flags, "--methods", "bone", "--r", "4")
        assert status == 2
        assert "was run with other settings; choose another --out" in error


class TestGradnorms:
    SCRIPT = REPOSITORY / "scripts/paper/figure_gradnorms.py"

    @pytest.mark.slow
    def test_norms_of_first_gradients(self, inputs, tmp_path, run):
        words = "--ranks 2 8 --biglora_r 32 --seeds 0 1 --micro_bsz 2 --ctx_len 16 --out"
        status, out, _ = run(*inputs, *words.split(), tmp_path / "out")
        assert status == 0
        assert "| | r 2 | r 8 | any r |" in out
        assert (tmp_path / "out/gradnorms.png").read_bytes().startswith(b"\x89PNG")
        rows = read_json(tmp_path / "out/gradnorms.json")["rows"]
        norms = {(row["method"], row["r"]): row["norms"] for row in rows}
        for full, frozen in zip(norms["full", None], norms["frozen_ft", None], strict=True):
            assert 0 < frozen < full, "part of the parameters, the same gradients"
        assert norms["bone", 2][0] != norms["bone", 2][1], "a batch for each seed"
        assert all(n < f for n, f in zip(norms["lora", 8], norms["full", None], strict=True))
