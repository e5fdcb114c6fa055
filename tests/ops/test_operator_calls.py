"""A step makes few calls of operators for each block: launching them is what limits small ones."""

import json

import pytest
from helpers.support import REPOSITORY, run_script

MOST_CALLS = {"bone": 56, "bat_row": 56}


@pytest.mark.parametrize("generation", [6, 7])
def test_calls_of_a_block_that_is_recomputed(generation, kernels, tmp_path):
    json_file = tmp_path / "counts.json"
    count = REPOSITORY / "scripts" / "dev" / "count_operators.py"
    chosen = "--generations", generation, "--methods", *MOST_CALLS, "--grad_cp", 1
    done = run_script(count, *chosen, "--json", json_file)
    assert done.returncode == 0, done.stderr
    found = {(row["method"], row["form"]): row for row in json.loads(json_file.read_text())}
    for method, most in MOST_CALLS.items():
        assert found[method, "now"]["calls"] <= most
        assert found[method, "before"]["calls"] > 3 * found[method, "now"]["calls"]
        assert found[method, "before"]["launches"] > 1.4 * found[method, "now"]["launches"]
