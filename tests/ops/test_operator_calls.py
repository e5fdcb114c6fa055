"""A step makes few calls of operators for each block: launching them is what limits small ones."""

import json

from helpers.support import REPOSITORY, run_script

MOST_CALLS = {"bone": 60, "bat_row": 75}


def test_calls_of_a_block_that_is_recomputed(kernels, tmp_path):
    json_file = tmp_path / "counts.json"
    count = REPOSITORY / "scripts" / "dev" / "count_operators.py"
    done = run_script(count, "--methods", *MOST_CALLS, "--grad_cp", 1, "--json", json_file)
    assert done.returncode == 0, done.stderr
    found = {(row["method"], row["form"]): row for row in json.loads(json_file.read_text())}
    for method, most in MOST_CALLS.items():
        assert found[method, "now"]["calls"] <= most
        assert found[method, "before"]["calls"] > 3 * found[method, "now"]["calls"]
        assert found[method, "before"]["launches"] > 1.4 * found[method, "now"]["launches"]
