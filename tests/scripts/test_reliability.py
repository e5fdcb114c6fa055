"""A sample of the attacks of docs/reliability.md; all of it: `python scripts/reliability`."""

import re

from helpers.support import run_script


def test_a_sample_of_all_attacks_holds():
    done = run_script("scripts/reliability", "--quick", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    tried = [int(n) for n in re.findall(r"^\| [^|]+ \| (\d+) \| \1 \|$", done.stdout, re.MULTILINE)]
    assert len(tried) > 35, "kinds"
    assert sum(tried) > 100
    assert "0 faults" in done.stdout
