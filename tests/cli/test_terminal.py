"""Names from files of others never command a terminal."""

import pytest
import torch
from helpers.support import save_model, small_model

from finchtune import distributed
from finchtune.cli import flags, init, merge
from finchtune.errors import UserError, print_error, printable
from finchtune.weights.base import load_model

EVIL = "\x1b]0;owned\x07\x9b31m\r\x08"


def raw_controls(text: str) -> set[str]:
    return {char for char in text if not char.isprintable() and char not in "\n\t"}


def test_names_of_tensors_and_paths_are_written_out(tmp_path, capsys):
    weights = small_model().state_dict() | {f"blocks.0.{EVIL}": torch.zeros(2)}
    path = tmp_path / f"base{EVIL}.pth"
    torch.save(weights, path)
    with pytest.raises(UserError) as error:
        load_model(path)
    print_error(error.value)
    shown = capsys.readouterr().err
    assert r"\x1b]0;owned\x07\x9b31m" in shown
    assert not raw_controls(shown)


def test_commands_show_no_raw_path(tmp_path, capsys):
    base = save_model(small_model(), tmp_path / "base.pth")
    output = str(tmp_path / f"m{EVIL}.pth")
    merge.main(["--base_model", str(base), "--peft_checkpoint", str(base), "--output", output])
    init.main(["--n_layer", "1", "--n_embd", "64", "--vocab_size", "64", "--output", output])
    distributed.print_rank_zero(f"resumed from {EVIL}")
    shown = capsys.readouterr().out
    assert shown.count(r"\x1b]0;owned") >= 3
    assert not raw_controls(shown)


def test_text_stays_as_it_is_and_bytes_of_no_text_can_be_printed():
    text = "Öl 芬奇 🐦 \u200d\n\tf(x)"
    assert printable(text) == text
    assert printable("a\udcffb").encode() == rb"a\udcffb"


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        (flags, [f"--{EVIL}"]),
        (flags, ["--micro_bsz", EVIL]),
        (init, ["--n_layer", EVIL]),
        (merge, [f"--{EVIL}", "x"]),
    ],
)
def test_mistakes_in_flags_hold_what_was_given_written_out(verb, words, capsys):
    """argparse's own messages and ours."""
    with pytest.raises(UserError) as error:
        (flags.parse_train_flags if verb is flags else verb.main)(words)
    print_error(error.value)
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert not raw_controls(shown.out + shown.err)
