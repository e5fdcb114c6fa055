"""Batched generation: a row's text is its own, however rows come and go."""

import random

import pytest
import torch
from helpers.support import every_generation, rwkv_package_greedy, small_model

import finchtune
from finchtune.adapters import attach
from finchtune.errors import UserError
from finchtune.inference.engine import Engine, Request
from finchtune.inference.generate import generate, generate_batch
from finchtune.inference.sampling import Sampling
from finchtune.tokenizer import BytesTokenizer


def greedy(model, prompt, n):
    """The likeliest continuation, with the whole text read anew for every token."""
    tokens = list(prompt)
    for _ in range(n):
        logits, _ = model(torch.tensor([tokens]))
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] == 0:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


def some_prompts(count, longest=40, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(1, 256) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def finish(engine):
    while not engine.idle:
        engine.step()


@every_generation
def test_generation_equals_reading_everything_anew(generation):
    model, prompts = small_model(generation=generation), some_prompts(5)
    expected = [greedy(model, prompt, 12) for prompt in prompts]
    assert finchtune.generate_batch(model, prompts, 12) == expected
    assert [list(generate(model, prompt, 12, temperature=0)) for prompt in prompts] == expected


def test_text_equals_the_rwkv_package(trained_model):
    prompt = list(b"Ada has 5 apples and finds 3 more.")
    found = generate_batch(finchtune.load_model(trained_model), [prompt], 300, stop_tokens=())
    assert found == [rwkv_package_greedy(trained_model, prompt, 300)]


@pytest.mark.parametrize(("max_rows", "generation"), [(1, 6), (3, 6), (16, 6), (3, 7)])
def test_a_row_is_the_same_whenever_it_arrives(max_rows, generation):
    """Also where a prompt is read in several pieces, and where rows are cancelled around it."""
    model, prompts = small_model(generation=generation), some_prompts(12, longest=200)
    alone = [generate_batch(model, [prompt], 15)[0] for prompt in prompts]
    for seed in range(3):
        draw = random.Random(seed)
        order = draw.sample(range(12), 12)
        engine = Engine(model, max_rows=max_rows, prompt_tokens=64)
        rows, others = {}, []
        for index in order:
            rows[index] = engine.submit(Request(prompts[index], 15))
            others.append(engine.submit(Request(prompts[index][:3], 15)))
            for _ in range(draw.randrange(4)):
                engine.step()
            engine.cancel(draw.choice(others))
        finish(engine)
        assert [rows[index].tokens for index in range(12)] == alone


def test_a_long_prompt_keeps_no_short_one_waiting():
    model = small_model()
    engine = Engine(model, prompt_tokens=128)
    long = engine.submit(Request(some_prompts(1)[0] * 200, 1, stop_tokens=()))
    engine.step()
    short = engine.submit(Request([5], 3, stop_tokens=()))
    for _ in range(3):
        engine.step()
    assert short.finish_reason == "length"
    assert long.tokens == []
    finish(engine)
    assert [long.tokens, short.tokens] == [
        generate_batch(model, [row.request.prompt], row.request.max_tokens, stop_tokens=())[0]
        for row in (long, short)
    ]


@pytest.mark.parametrize("sizes", [[10], [500], [40] * 20, [1000, 3, 70], [64, 65], [129, 128]])
def test_pieces_fill_the_room_and_no_more(sizes):
    engine = Engine(small_model(), prompt_tokens=256)
    rows = [engine.submit(Request([1] * size, 1)) for size in sizes]
    engine.reading = rows
    pieces = engine._next_pieces()
    total = sum(n for _, n in pieces)
    assert total <= 256
    assert total > min(256, sum(sizes)) - 64, "room for another chunk was left"
    assert all(n == len(row.unread) or n % 64 == 0 for row, n in pieces)


def test_a_seed_fixes_a_row_among_others():
    model, prompts = small_model(), some_prompts(6)
    settings = {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.5, "penalty_decay": 0.9}
    together = generate_batch(model, prompts, 20, seed=range(6), **settings)
    alone = [
        generate_batch(model, [p], 20, seed=i, max_rows=1, **settings)[0]
        for i, p in enumerate(prompts)
    ]
    assert together == alone
    assert generate_batch(model, prompts, 20, seed=7, **settings) != together


def test_adapters_write_as_when_merged():
    model, prompts = attach(small_model(), "bone", r=8), some_prompts(3)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            torch.nn.init.normal_(parameter, std=0.05)
    unmerged = generate_batch(model, prompts, 10)
    assert unmerged == generate_batch(finchtune.merge(model), prompts, 10)


def test_dropout_is_off_while_writing():
    model = attach(small_model(), "lora", r=4, dropout=0.5)
    for name, parameter in model.named_parameters():
        if ".adapter." in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.train()
    assert generate_batch(model, [[5]], 20) == generate_batch(model, [[5]], 20)
    assert model.training


def test_a_stop_token_ends_a_row_and_none_never_does():
    model = small_model()
    with torch.no_grad():
        model.head.weight.zero_()  # every logit equal: the first id, 0, is the likeliest
    assert generate_batch(model, [[5], [6, 7]], 10) == [[], []]
    assert generate_batch(model, [[5], []], 10, stop_tokens=()) == [[0] * 10] * 2
    assert list(generate(model, [5], 10, temperature=0)) == []


def test_a_stop_string_ends_text_and_tokens():
    model, tokenizer = small_model(), BytesTokenizer()
    whole = generate_batch(model, [[5]], 40, stop_tokens=())[0]
    text = tokenizer.decode(whole)
    stop = next(text[i : i + 2] for i in range(10, 38) if "\ufffd" not in text[i : i + 2])
    engine = Engine(model, tokenizer)
    row = engine.submit(Request([5], 40, stop_tokens=(), stop_strings=["never met", stop]))
    released = []
    while not engine.idle:
        released += [text for _, text in engine.step()]
    assert row.finish_reason == "stop"
    assert row.text == "".join(released) == text[: text.index(stop)]
    assert row.tokens == whole[: len(row.tokens)]
    assert tokenizer.decode(row.tokens) == row.text


def test_ids_without_text_are_not_drawn():
    model = small_model(vocab_size=300)
    with torch.no_grad():
        model.head.weight[:256] = 0
    engine = Engine(model, BytesTokenizer())
    row = engine.submit(Request([5], 5, Sampling(temperature=1.0), stop_tokens=()))
    finish(engine)
    assert max(row.tokens) < 256


def test_going_on_from_a_state_equals_reading_all():
    model = small_model()
    first, second = some_prompts(2)
    engine = Engine(model, max_rows=2)
    row = engine.submit(Request(first, 1, stop_tokens=(), keep_state=True))
    finish(engine)
    after = engine.submit(Request(second, 10, state=row.prompt_state))
    other = engine.submit(Request(second, 10))
    finish(engine)
    assert after.tokens == generate_batch(model, [first + second], 10)[0]
    assert other.tokens == generate_batch(model, [second], 10)[0]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([1, 256], 5), "token id 256 lies outside"),
        (Request([-1], 5), "token id -1 lies outside"),
        (Request([1], 0), "max_tokens must be at least 1"),
        (Request([1], 5, stop_strings=["x"]), "give the tokenizer too"),
    ],
)
def test_impossible_requests_are_refused(request_, message):
    engine = Engine(small_model())
    with pytest.raises(UserError, match=message):
        engine.submit(request_)
    assert engine.idle


def test_a_seed_for_each_prompt_or_one_for_all():
    with pytest.raises(UserError, match="2 seeds were given for 1 prompts"):
        generate_batch(small_model(), [[1]], 5, seed=[1, 2])


def test_a_row_without_numbers_fails_alone():
    """Its neighbours write what they write without it, and others after it."""
    model, prompts = small_model(), [[7, 9, 200], [7, 1, 200], [5, 1, 6, 2]]
    expected = [generate_batch(model, [prompt], 12)[0] for prompt in prompts[1:]]
    with torch.no_grad():
        model.emb.weight[9] = float("nan")
    engine = Engine(model)
    rows = [engine.submit(Request(prompt, 12)) for prompt in prompts]
    while not engine.idle:
        engine.advance()
    assert [row.finish_reason for row in rows] == ["failed", "length", "length"]
    assert [row.tokens for row in rows] == [[], *expected]
    with pytest.raises(UserError, match="computes NaN or infinity instead of a text"):
        generate_batch(model, prompts, 12)
