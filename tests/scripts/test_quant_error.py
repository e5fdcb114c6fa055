"""The error of each form of a frozen base, as scripts/bench/quant_error.py prints it."""

import json

from helpers.support import REPOSITORY, save_model, small_model

SCRIPT = REPOSITORY / "scripts" / "bench" / "quant_error.py"


def test_forms_are_held_against_fp32(kernels, run, tmp_path):
    model = save_model(small_model(n_embd=128, dim_ffn=448), tmp_path / "model.pth")
    record = {"question": "How much is two and two?", "answer": "It is four, as it always was."}
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join([json.dumps(record)] * 9))
    sizes = "--steps", 5, "--rows", 1, "--ctx_len", 16, "--encoding", "utf-8"
    given = "--model", model, "--data", data, "--forms", "none", "fp8_compute", *sizes
    status, out, _ = run(*given)
    assert status in (0, None)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    errors = {row[0]: [float(x.rstrip("%")) for x in row[1:3]] for row in rows[2:]}
    assert errors["fp32"] == [0, 0]
    assert 0 < errors["none"][0] < errors["fp8_compute"][0] < 20
    assert errors["none"][1] < errors["fp8_compute"][1]
    status, _, error = run(*given[:-1], "utf-8", "--steps", 500)
    assert status == 2
    assert "fewer than the" in error
