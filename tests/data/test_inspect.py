"""The numbers and texts that a person reads about a data set."""

import numpy as np
import pytest

from finchtune.data import inspect
from finchtune.data.documents import Documents
from finchtune.tokenizer import BytesTokenizer, load_tokenizer


def documents_of(texts, trained=None) -> Documents:
    """Byte documents; `trained` has one digit per byte."""
    raw = [text.encode() for text in texts]
    mask = None if trained is None else np.array(list(map(int, "".join(trained))), np.uint8)
    tokens = np.frombuffer(b"".join(raw), np.uint8).astype("<u2")
    return Documents("test", tokens, np.cumsum([0, *map(len, raw)]), mask)


def test_the_overview_counts():
    lines = list(inspect.overview(documents_of(["abc\0", "", "abcdef"], ["0011", "", "111111"])))
    text = "\n".join(lines)
    assert "documents       3" in text
    assert "tokens          10" in text
    assert "uint16" in text
    assert "ending in 0     1 of 3 documents" in text
    assert "trained on      80.0%" in text
    assert "mean 3.3, min 0, median 4, 90% 4, 99% 4, max 6" in text


def test_no_documents_have_an_overview_too():
    empty = documents_of([])
    assert "documents       0" in "\n".join(inspect.overview(empty))
    assert list(inspect.length_histogram(empty.sizes)) == []
    assert list(inspect.rows_at(empty, 8, 1)) == []


def test_the_histogram_has_a_bin_for_each_doubling():
    sizes = np.array([1, 2, 3, 3, 4, 7, 8, 100])
    lines = [line.replace("#", "").split() for line in inspect.length_histogram(sizes)]
    assert [" ".join(line[:-1]) for line in lines] == [
        "1", "2 to 3", "4 to 7", "8 to 15", "16 to 31", "32 to 63", "64 to 127"
    ]  # fmt: skip
    assert [int(line[-1]) for line in lines] == [1, 3, 2, 1, 0, 0, 1]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 1023, 1024, 2**20 - 1, 2**20])
def test_every_length_falls_into_the_bin_that_names_it(size):
    (line,) = inspect.length_histogram(np.array([size]))
    numbers = [int(word.replace(",", "")) for word in line.split("#")[0].split() if word != "to"]
    assert numbers[0] <= size <= numbers[-2]
    assert numbers[-1] == 1


def test_ids_are_counted(monkeypatch):
    monkeypatch.setattr(inspect, "SCAN_TOKENS", 3)
    counts = inspect.vocabulary_use(documents_of(["aab", "b\0"]), 256)
    assert counts.sum() == 5
    assert (counts[97], counts[98], counts[0]) == (2, 2, 1)


def test_rows_of_both_modes_are_told():
    lines = list(inspect.rows_at(documents_of(["a" * 5, "b" * 5, "c" * 20]), 8, 1))
    assert lines == [
        "pad at 8        3 rows, 33.3% padding",
        "pack at 8       2 rows, 0.0% padding",
        "labels          each of 3 documents has a trained token",
        "cut off         11 tokens of 1 documents longer than ctx_len 8, 11 of them trained",
        "ctx_len         19 keeps all trained tokens of 95% of the documents, 19 of all",
    ]


def test_samples_are_distinct_and_repeat():
    documents = documents_of(["x"] * 20)
    drawn = inspect.sample(documents, 5, 1)
    assert len(set(drawn)) == 5
    assert drawn == inspect.sample(documents, 5, 1) != inspect.sample(documents, 5, 2)
    assert inspect.sample(documents, 99, 1) == list(range(20))


def test_the_trained_part_is_marked():
    documents = documents_of(["Q: 1\nA: 2\0"], ["0000000" + "111"])
    plain = inspect.marked_text(documents, 0, BytesTokenizer(), colour=False)
    assert plain == "Q: 1\nA:« 2<end>»"
    coloured = inspect.marked_text(documents, 0, BytesTokenizer(), colour=True)
    assert coloured == "\x1b[2mQ: 1\nA:\x1b[0m\x1b[32m 2<end>\x1b[0m"


def test_control_characters_do_not_reach_the_terminal():
    shown = inspect.marked_text(documents_of(["a\x1b[31mé\r"]), 0, BytesTokenizer(), colour=False)
    assert shown == "«a\\x1b[31mé\\r»"


def test_a_character_of_several_tokens_is_shown_once():
    world = load_tokenizer("world")
    ids = world.encode("🐦 ab")
    documents = Documents("test", np.array(ids), np.array([0, len(ids)]))
    assert inspect.marked_text(documents, 0, world, colour=False) == "«🐦 ab»"
