"""What a tokenizer.json may ask for and does not get, and what its model does not know."""

import json
import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from finchtune.data import load_data
from finchtune.data.prepare import prepare
from finchtune.data.render import Layout
from finchtune.data.workers import Recipe
from finchtune.errors import UserError
from finchtune.tokenizer import hugging_face, load_tokenizer

VOCABULARY = {"<end>": 0, "a": 1, "b": 2, "ab": 3, "c": 4}


def bpe(path, unknown=None, dropout=None, pattern=None, **more) -> str:
    """A tokenizer.json of a, b, ab and c."""
    vocabulary = VOCABULARY | ({unknown: 5} if unknown else {})
    model = models.BPE(vocabulary, [("a", "b")], unk_token=unknown, dropout=dropout, **more)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(["<end>"])
    if pattern:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    path = str(path / "tokenizer.json")
    tokenizer.save(path)
    return path


def test_truncation_and_padding_are_switched_off(tmp_path):
    path = bpe(tmp_path)
    tokenizer = Tokenizer.from_file(path)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9, pad_id=4, pad_token="c")
    tokenizer.save(path)
    assert len(Tokenizer.from_file(path).encode("c").ids) == 9
    assert load_tokenizer(path).encode("cab") == [4, 3]
    assert load_tokenizer(path).encode("cccc") == [4] * 4


def test_dropout_is_switched_off(tmp_path):
    path = bpe(tmp_path, dropout=0.9)
    drawn = {tuple(Tokenizer.from_file(path).encode("ab").ids) for _ in range(50)}
    assert len(drawn) == 2
    tokenizer = load_tokenizer(path)
    assert {tuple(tokenizer.encode("ab")) for _ in range(50)} == {(3,)}


@pytest.mark.parametrize("unknown", [None, "<?>"])
def test_characters_without_a_token_are_counted(tmp_path, unknown):
    tokenizer = load_tokenizer(bpe(tmp_path, unknown))
    assert tokenizer.encode("aébé三") == ([3] if unknown is None else [1, 5, 2, 5, 5])
    assert tokenizer.encode("ab") == [3]
    assert tokenizer.take_unknown() == {"é": 2, "三": 1}
    assert tokenizer.take_unknown() == {}


def test_byte_level_tokenizers_know_every_character(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<end>": 0} | {c: i for i, c in enumerate(alphabet, 1)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert len(loaded.encode("é 三\n")) == 7
    assert loaded.take_unknown() == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_unknown_characters_are_told_by_prepare_and_before_training(tmp_path, workers):
    path = bpe(tmp_path, "<?>")
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "aé"}\n{"text": "béé"}\n')
    totals = prepare([str(source)], str(tmp_path / "out"), Recipe(Layout(), path, "<u2"), workers)
    assert totals.unknown == {"é": 3}
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        data = load_data(
            str(source), "jsonl", "pad", 8, tokenizer=load_tokenizer(path), vocab_size=256,
            cache_dir=cache
        )  # fmt: skip
        assert dict(data.report())["unknown"] == (
            "3 characters have no token in this tokenizer: '\\xe9' (3)"
        )


def test_a_pattern_that_searches_for_ever_is_refused(tmp_path, capfd):
    with pytest.raises(UserError) as error:
        load_tokenizer(bpe(tmp_path, pattern=r"(a+)+$"))
    assert "tokenizer.json: its pattern" in str(error.value)


def test_a_file_that_is_no_tokenizer_is_told(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "BPE"}}))
    with pytest.raises(UserError, match=r"not a tokenizer\.json"):
        load_tokenizer(str(path))


def test_a_long_text_in_pieces_has_the_ids_of_the_whole(tmp_path, monkeypatch):
    words = ["the", "quick", "brown", "fox's", "1234", "über", "...", "\n\n", "  ", "x" * 300, "三"]
    drawn = random.Random(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )  # fmt: skip
    tokenizer.train_from_iterator([" ".join(words)] * 9, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(hugging_face, "PIECE", 500)
    text = " ".join(drawn.choices(words, k=3000))
    assert len(list(loaded._parts(text))) > 20
    assert loaded.encode(text) == tokenizer.encode(text).ids
    assert loaded.encode_array(text, np.dtype("<u2")).tolist() == tokenizer.encode(text).ids
    assert loaded.encode("x" * 5000) == tokenizer.encode("x" * 5000).ids
