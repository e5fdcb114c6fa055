"""Several data sets at once, held-out documents, the cache, and reading ahead."""

import json
import threading
from collections import Counter
from itertools import count
from pathlib import Path

import pytest

from finchtune.data import load_data
from finchtune.data.binidx import BinIdxWriter
from finchtune.data.mixing import parse_sources
from finchtune.data.prefetch import prefetch
from finchtune.errors import UserError
from finchtune.tokenizer import BytesTokenizer


@pytest.fixture
def sets(tmp_path) -> dict[str, str]:
    """Three data sets of 6, 30 and 4 documents; their tokens are 1000, 2000, 3000 and more."""
    prefixes = {}
    for k, (name, n) in enumerate({"a": 6, "b": 30, "c": 4}.items(), 1):
        prefixes[name] = str(tmp_path / name)
        with BinIdxWriter(prefixes[name], "<u2") as writer:
            for i in range(n):
                writer.add([1000 * k + i, 1, 2, 0])
    return prefixes


def load(data_file, dataload="pad", **more):
    return load_data(data_file, "binidx", dataload, 3, seed=3, **more)


def drawn(data, epoch=0) -> Counter:
    """How often each document's first token stands in an epoch."""
    rows = range(epoch * data.n_rows, (epoch + 1) * data.n_rows)
    return Counter(int(data.rows(i, 0, 1, 1, 1)[0].tokens[0, 0]) for i in rows)


def test_without_weights_every_row_of_every_set_comes_once(sets):
    data = load(f"{sets['a']},{sets['b']},{sets['c']}")
    assert data.n_rows == 40
    expected = {*range(1000, 1006), *range(2000, 2030), *range(3000, 3004)}
    for epoch in (0, 1):
        assert drawn(data, epoch) == Counter(expected)
    assert data.describe()["documents"] == 40


@pytest.mark.parametrize("dataload", ["pad", "pack", "get", "only"])
def test_weights_are_the_shares_of_the_rows(sets, dataload):
    data = load(f"{sets['a']}:0.5,{sets['b']}.bin:.25,{sets['c']}:1.25", dataload)
    # A row of packed documents counts once, by its first.
    documents = [data.document_ids(i, 0, 1, 1, 1)[0] for i in range(data.n_rows)]
    shares = Counter("a" if i < 6 else "b" if i < 36 else "c" for i in documents)
    exact = {"a": 0.25 * data.n_rows, "b": 0.125 * data.n_rows, "c": 0.625 * data.n_rows}
    assert sum(shares.values()) == data.n_rows
    assert all(abs(shares[k] - exact[k]) <= 1 for k in exact)


def test_a_set_goes_round_evenly_within_and_across_epochs(sets):
    data = load(f"{sets['a']}:1,{sets['b']}:1")
    total: Counter = Counter()
    for epoch in range(5):
        total += drawn(data, epoch)
    often = [total[1000 + i] for i in range(6)]
    seldom = [total[2000 + i] for i in range(30)]
    assert max(often) - min(often) == 0
    assert max(seldom) - min(seldom) == 0


def test_a_tiny_weight_still_gives_a_row(sets):
    shares = drawn(load(f"{sets['a']}:0.0001,{sets['b']}:1"))
    assert sum(n for token, n in shares.items() if token < 2000) == 1


def test_documents_are_numbered_through_all_sets(sets):
    data = load(f"{sets['c']},{sets['a']}")
    for i in range(data.n_rows):
        (document,) = data.document_ids(i, 0, 1, 1, 1)
        first = int(data.rows(i, 0, 1, 1, 1)[0].tokens[0, 0])
        assert document == (first - 3000 if first >= 3000 else first - 1000 + 4)


@pytest.mark.parametrize("name", ["a,b", "a:0.5", "a:0.5,b:0.5"])
def test_a_path_that_is_there_is_itself(tmp_path, name):
    (tmp_path / name).write_text("")
    assert parse_sources(str(tmp_path / name)) == [(str(tmp_path / name), None)]


@pytest.mark.parametrize(
    ("data_file", "message"),
    [
        ("a:1,b", "give every data set a weight, or none of them"),
        ("a,,b", "a name is missing beside a comma"),
        ("a:0,b:1", "weights must be above 0"),
        ("a:1,b:1", r"a\.idx: No such file"),
    ],
)
def test_sources_that_make_no_mix_are_refused(data_file, message):
    with pytest.raises(UserError, match=message):
        load(data_file)


def test_train_and_val_are_a_partition_of_the_documents(sets):
    data = load(sets["b"], val_split=0.3)
    train, val = drawn(data), drawn(data.validation)
    assert train + val == Counter(range(2000, 2030))
    assert len(train) > len(val) > 0


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(f'{{"q": "q{i}", "a": "a{i}"}}\n' for i in range(20)))
    return path


def load_cached(path, cache_dir, **more):
    return load_data(
        str(path), "sft", "pad", 300, "qa", ["q", "a"], BytesTokenizer(), 256, 1,
        cache_dir=cache_dir, **more
    )  # fmt: skip


def labels_of(data):
    return data.rows(0, 0, 1, 20, 1)[0].labels.tolist()


def test_the_cache_gives_what_it_was_given(questions, tmp_path):
    plain = load_cached(questions, None)
    for _ in range(2):
        assert labels_of(load_cached(questions, tmp_path / "cache")) == labels_of(plain)
    names = sorted(path.suffixes[-1] for path in (tmp_path / "cache").iterdir())
    assert names == [".bin", ".bin", ".idx", ".idx", ".json", ".json", ".sha256"]


def test_the_cache_is_really_used(questions, tmp_path):
    def entry() -> dict[str, tuple[int, int]]:
        found = {path.name: path.stat() for path in (tmp_path / "cache").iterdir()}
        return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}

    load_cached(questions, tmp_path / "cache")
    made = entry()
    load_cached(questions, tmp_path / "cache")
    assert entry() == made


def test_other_content_and_other_fields_are_other_entries(questions, tmp_path):
    load_cached(questions, tmp_path / "cache")
    questions.write_text(questions.read_text().replace("a7", "b7"))
    assert labels_of(load_cached(questions, tmp_path / "cache")) == labels_of(
        load_cached(questions, None)
    )
    assert len(list((tmp_path / "cache").iterdir())) == 14
    load_data(
        str(questions), "sft", "pad", 300, "qa", ["a", "q"], BytesTokenizer(), 256,
        cache_dir=tmp_path / "cache"
    )  # fmt: skip
    assert len(list((tmp_path / "cache").iterdir())) == 21


@pytest.mark.parametrize("cached", [False, True])
def test_a_folder_is_read_file_by_file(questions, tmp_path, cached):
    (tmp_path / "in").mkdir()
    lines = questions.read_text().splitlines(keepends=True)
    (tmp_path / "in" / "a.jsonl").write_text("".join(lines[:7]))
    (tmp_path / "in" / "b.jsonl").write_text("".join(lines[7:]))
    data = load_cached(tmp_path / "in", tmp_path / "cache" if cached else None)
    assert labels_of(data) == labels_of(load_cached(questions, None))


def test_a_damaged_entry_is_made_anew(questions, tmp_path):
    load_cached(questions, tmp_path / "cache")
    for path in (tmp_path / "cache").glob("*.idx"):
        path.write_bytes(path.read_bytes()[:-3])
    assert labels_of(load_cached(questions, tmp_path / "cache")) == labels_of(
        load_cached(questions, None)
    )


def test_skipped_records_are_reported_every_time(questions, tmp_path):
    questions.write_text(questions.read_text() + json.dumps({"q": [1], "a": 2}))
    for _ in range(2):
        data = load_cached(questions, tmp_path / "cache", on_bad="skip")
        assert data.describe()["skipped_records"] == 1


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]


def test_prefetched_items_are_the_items_in_order():
    assert list(prefetch(iter(range(50)))) == list(range(50))
    assert list(prefetch([])) == []
    assert list(prefetch([None, None])) == [None, None]
    assert threads() == []


def test_no_more_than_depth_items_are_made_ahead():
    made = []
    ahead = prefetch((made.append(i) or i for i in count()), depth=3)
    assert [next(ahead) for _ in range(5)] == list(range(5))
    ahead.close()
    assert len(made) <= 5 + 3 + 1
    assert threads() == []


def test_an_error_is_raised_in_its_turn():
    def items():
        yield 1
        raise UserError("bad")

    ahead = prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(UserError, match="bad"):
        next(ahead)
    assert threads() == []
