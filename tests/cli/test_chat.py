"""scripts/chat.py, run as people run it: lines in, answers out."""

import io
import json

import pytest
from helpers.support import REPOSITORY, save_model, small_model

SCRIPT = REPOSITORY / "scripts" / "chat.py"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return save_model(small_model(), tmp_path_factory.mktemp("model") / "m.pth")


@pytest.fixture
def talk(run, model_file, monkeypatch):
    """Enter lines; returns status, output and error."""

    def talk(*lines, flags=("--temperature", 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        return run("--model", model_file, "--tokens", 8, *flags)

    return talk


def test_commands_do_what_they_say(talk, tmp_path):
    file = tmp_path / "talk.json"
    status, out, error = talk(
        "Who?", "/retry", "/reset", "Who?", f"/save {file}", "Why?", f"/load {file}", "Why?"
    )
    assert (status, error) == (0, "")
    who, again, reset, same, saved, why, loaded, why_again = out.splitlines()
    assert who == again == same
    assert why == why_again
    assert (reset, saved) == ("a new conversation", f"saved to {file}")
    assert loaded == f"2 messages from {file}"
    messages = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[0]["content"] == "Who?"


def test_mistakes_are_told_and_the_conversation_goes_on(talk, tmp_path):
    status, out, error = talk(
        "/retry", "/save", f"/load {tmp_path}/none.json", "/relod", "/etc/hosts?", "/help", "/exit"
    )
    assert status == 0
    assert [line[:30] for line in error.splitlines()] == [
        "error: there is no question to"[:30],
        "error: /save needs the name of a file"[:30],
        f"error: {tmp_path}/none.json: cannot"[:30],
        "error: there is no command /re"[:30],
    ]
    assert len(out.splitlines()) == 1 + 6, "one answer and the help"


def test_the_system_text_and_the_seed_count(talk):
    plain = talk("Who?", flags=["--seed", 1])[1]
    assert talk("Who?", flags=["--seed", 1])[1] == plain
    assert talk("Who?", flags=["--seed", 2])[1] != plain
    assert talk("Who?", flags=["--seed", 1, "--system", "Be brief."])[1] != plain


def test_bad_flags_fail_in_one_line(talk):
    status, out, error = talk("Who?", flags=["--template", "chatt"])
    assert (status, out) == (2, "")
    assert error.count("\n") == 1
    assert "did you mean chat?" in error
