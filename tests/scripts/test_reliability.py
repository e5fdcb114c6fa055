"""A sample of the attacks of docs/reliability.md; all of it: `python scripts/reliability`."""

import re

import pytest
from helpers.support import run_script


@pytest.mark.parametrize("cases", [50, pytest.param(150, marks=pytest.mark.slow)])
def test_a_sample_of_all_attacks_holds(cases):
    done = run_script("scripts/reliability", "--cases", cases)
    assert done.returncode == 0, done.stdout + done.stderr
    tried = [int(n) for n in re.findall(r"^\| [^|]+ \| (\d+) \| \1 \|$", done.stdout, re.MULTILINE)]
    assert len(tried) > 25, "kinds"
    assert sum(tried) > 0.8 * cases
    assert "0 faults" in done.stdout
