"""Sampling, streaming and batched generation."""

import pytest
import torch
from helpers.support import run_script, save_model, small_model

from finchtune.data import PROMPT
from finchtune.errors import UserError
from finchtune.evaluation import final_number
from finchtune.inference.generate import generate, generate_batch, sample


def greedy(model, prompt, n):
    """The likeliest continuation, with the whole text read anew for every token."""
    tokens = list(prompt)
    for _ in range(n):
        logits, _ = model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == 0:
            break
    return tokens[len(prompt) :]


def test_recurrent_generation_equals_reading_everything_anew():
    model, prompt = small_model(), [5, 6, 7, 8]
    assert list(generate(model, prompt, 12, temperature=0)) == greedy(model, prompt, 12)


def test_batched_generation_equals_one_by_one():
    model = small_model()
    prompts = [[5, 6, 7, 8], [9], [1, 2, 3, 4, 5, 6, 7]]
    expected = [[t for t in greedy(model, prompt, 9) if t != 0] for prompt in prompts]
    assert generate_batch(model, prompts, 9) == expected


def test_generation_stops_after_an_end_of_document():
    model = small_model()
    with torch.no_grad():
        model.head.weight.zero_()  # every logit equal: the first id, 0, is the likeliest
    assert list(generate(model, [5], 10, temperature=0)) == [0]
    assert generate_batch(model, [[5], [6, 7]], 10) == [[], []]


def test_seed_fixes_the_text_and_empty_prompt_starts_a_document():
    model = small_model()
    first = list(generate(model, [], 20, seed=1))
    assert first == list(generate(model, [], 20, seed=1))
    assert first != list(generate(model, [], 20, seed=2))


def test_sampling_follows_temperature_and_nucleus():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    generator = torch.Generator().manual_seed(0)

    def shares(temperature, top_p, n=4000):
        drawn = [sample(logits, temperature, top_p, generator) for _ in range(n)]
        return torch.bincount(torch.tensor(drawn), minlength=4) / n

    assert shares(0, 1.0, 5).tolist() == [1, 0, 0, 0]
    assert torch.allclose(shares(1.0, 1.0), logits.exp(), atol=0.03)
    assert torch.allclose(shares(1.0, 0.7), torch.tensor([2 / 3, 1 / 3, 0, 0]), atol=0.03)
    assert shares(0.1, 1.0)[0] > 0.99


@pytest.mark.parametrize(("temperature", "top_p"), [(-1, 1), (1, 0), (1, 1.5)])
def test_bad_sampling_settings_are_refused(temperature, top_p):
    with pytest.raises(UserError, match="temperature must be at least 0"):
        next(generate(small_model(), [1], 1, temperature, top_p))


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
