"""scripts/generate.py, run as people run it."""

import json

import pytest
import torch
from helpers.support import REPOSITORY, save_model, small_model

import finchtune
from finchtune.adapters import adapter_state, attach
from finchtune.data import templates
from finchtune.errors import printable
from finchtune.files import sha256
from finchtune.inference.generate import generate_batch
from finchtune.tokenizer import BytesTokenizer
from finchtune.weights.adapter_files import save_adapter
from finchtune.weights.state_files import set_states
from finchtune.weights.tensors import write_tensors

SCRIPT = REPOSITORY / "scripts" / "generate.py"
GREEDY = ("--temperature", 0)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return save_model(small_model(), tmp_path_factory.mktemp("model") / "m.pth")


def expected_text(model, prompt, n=10):
    tokenizer = BytesTokenizer()
    return tokenizer.decode(generate_batch(model, [tokenizer.encode(prompt)], n)[0])


def test_text_is_streamed_after_its_prompt(run, model_file):
    status, out, _ = run("--model", model_file, "--prompt", "Why?", "--tokens", 10, *GREEDY)
    assert status == 0
    text = expected_text(finchtune.load_model(model_file), "Why?")
    assert out == printable("Why?" + text) + "\n"


def test_text_begins_from_a_state_in_a_file(run, model_file, tmp_path):
    """As --state, and as an adapter file, which serving several at once takes."""
    path = tmp_path / "state.pth"
    write_tensors({f"blocks.{i}.att.time_state": 20 * torch.randn(8, 8, 8) for i in range(2)}, path)
    model = finchtune.load_model(model_file)
    plain = expected_text(model, "Why?")
    set_states(model, path)
    expected = expected_text(model, "Why?")
    assert expected != plain
    for flag in ("--state", "--peft_checkpoint"):
        words = ("--prompt", "Why?", "--tokens", 10, *GREEDY, flag, path)
        status, out, _ = run("--model", model_file, *words)
        assert status == 0
        assert out == printable("Why?" + expected) + "\n"
    status, _, error = run("--model", model_file, "--prompt", "Why?", "--state", model_file)
    assert status == 2
    assert "holds no initial states" in error


def test_a_question_is_put_as_its_template_puts_it(run, model_file):
    for name in ("metamath", "chat"):
        flags = ["--model", model_file, "--tokens", 5, "--template", name, "--seed", 1]
        prompt = templates.get(name).prompt("Why?")
        _, asked, _ = run(*flags, "--question", "Why?")
        _, given, _ = run(*flags, "--prompt", prompt)
        assert asked == given
        assert asked.startswith(prompt)


def test_prompts_of_a_file_are_answered_in_order(run, model_file, tmp_path):
    file = tmp_path / "p.jsonl"
    rows = [{"prompt": "a" * n} for n in (30, 1, 7)] + [{"question": "Why?"}]
    file.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    status, out, _ = run(
        "--model", model_file, "--prompts", file, "--tokens", 10, "--batch", 2, *GREEDY
    )
    assert status == 0
    results = [json.loads(line) for line in out.splitlines()]
    prompts = [row["prompt"] for row in rows[:3]] + [templates.get("metamath").prompt("Why?")]
    assert [result["prompt"] for result in results] == prompts
    model = finchtune.load_model(model_file)
    assert [r["completion"] for r in results] == [expected_text(model, p) for p in prompts]


@pytest.mark.parametrize("quant", [None, "nf4"])
def test_an_adapter_stays_unmerged(run, model_file, tmp_path, quant):
    model = attach(finchtune.load_model(model_file), "bone", r=8, quant=quant)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    record = {
        "adapter": model.adapter_spec,
        "base": {"file": "m.pth", "sha256": sha256(model_file)},
    }
    save_adapter(adapter_state(model), record, tmp_path / "a.pth")
    flags = ["--model", model_file, "--prompt", "Why?", "--tokens", 10, *GREEDY]
    _, out, _ = run(*flags, "--peft_checkpoint", tmp_path / "a.pth")
    assert out == printable("Why?" + expected_text(model, "Why?")) + "\n"
    assert out != run(*flags)[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", 0], "--tokens must be at least 1 and at most 1,000,000, not 0"),
        (["--tokens", 2**31], "at most 1,000,000, not 2147483648"),
        (["--temperature", -1], "temperature must be in"),
        (["--top_p", 2], "top_p must be in (0, 1]"),
        (["--seed", -3], "seed must be in"),
        (["--model", "none.pth"], "none.pth: no such file"),
        (["--peft_checkpoint", "none.pth"], "none.pth: no such file"),
        (["--tokenizer", "none.json"], "none.json: no such file"),
        (["--template", "metamat"], "did you mean metamath?"),
        (["--device", "gpu"], "--device gpu: give cpu"),
        (["--device", "cuda:99"], "--device cuda"),
    ],
)
def test_bad_flags_fail_in_one_line_before_the_prompt(run, model_file, flags, message):
    status, out, error = run("--model", model_file, "--prompt", "PROMPT", *flags)
    assert (status, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no prompts"),
        ('{"prompt": 3}\n', ":1: an object with a string 'prompt' or 'question'"),
        ('{"prompt": "a"}\n[1]\n', ":2: an object with"),
        ('{"prompt": "a"}\n{\n', ":2: not JSON"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_of_prompts_is_refused(run, model_file, tmp_path, content, message):
    file = tmp_path / "p.jsonl"
    if content is not None:
        file.write_text(content)
    status, out, error = run("--model", model_file, "--prompts", file)
    assert (status, out) == (2, "")
    assert message in error


def test_escape_sequences_never_reach_a_terminal(run, tmp_path):
    """A model that writes nothing but the byte of escape."""
    model = small_model()
    with torch.no_grad():
        model.ln_out.weight.zero_()
        model.ln_out.bias.fill_(1.0)
        model.head.weight.fill_(-1.0)
        model.head.weight[0x1B] = 1.0
    path = save_model(model, tmp_path / "m.pth")
    flags = ["--model", path, "--tokens", 3, *GREEDY]
    _, out, _ = run(*flags, "--prompt", "a\x1b[31m\r\x9b\tb\n")
    assert out == "a\\x1b[31m\\r\\x9b\tb\n" + "\\x1b" * 3 + "\n"
