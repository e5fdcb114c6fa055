"""scripts/generate.py, run as people run it."""

import pytest
from helpers.support import run_script, save_model, small_model

from finchtune.data import PROMPT
from finchtune.evaluation import final_number


def test_script_streams_text(tmp_path):
    path = save_model(small_model(), tmp_path / "m.pth")
    flags = ["--model", path, "--tokens", 10, "--seed", 1]
    prompt = PROMPT.format(question="Why?")
    done, again = (
        run_script("scripts/generate.py", *flags, *asked)
        for asked in (["--prompt", prompt], ["--question", "Why?"])
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(prompt)
    assert done.stdout == again.stdout


@pytest.mark.parametrize(
    ("text", "number"),
    [("a 3 b 1,234.", "1234"), ("is -7.", "-7"), ("2.50 each", "2.50"), ("none", None), ("", None)],
)
def test_final_number(text, number):
    assert final_number(text) == number
