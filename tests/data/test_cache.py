"""Tokenised text kept from run to run: never read unless every bit of it is what was written."""

import json
import random

import numpy as np
import pytest
from helpers.kills import kill_everywhere

from finchtune.data.cache import read_cached
from finchtune.data.load import load_data
from finchtune.data.render import Layout
from finchtune.files import remove
from finchtune.tokenizer import load_tokenizer


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "qa.jsonl"
    rows = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(source):
    layout = Layout(("question", "answer"))
    return read_cached(str(source), layout, load_tokenizer("bytes"), "fail", source.parent / "c")


def test_every_flipped_bit_of_an_entry_is_seen_and_mended(source):
    good = read(source)
    tokens, trained = good.tokens.copy(), good.trained.copy()
    files = sorted((source.parent / "c").iterdir())
    assert len(files) == 7, files  # two pairs, provenance, note and checksums
    generator = random.Random(0)
    for path in files:
        whole = path.read_bytes()
        for place in generator.sample(range(8 * len(whole)), 6):
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            path.write_bytes(damaged)
            found = read(source)
            assert np.array_equal(found.tokens, tokens), (path, place)
            assert np.array_equal(found.trained, trained), (path, place)
            assert path.read_bytes() == whole, (path, place)


@pytest.mark.slow
def test_an_entry_is_whole_whenever_its_making_is_killed(source):
    folder = source.parent / "c"
    read(source)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    remove(folder)
    folder.mkdir()
    for _ in kill_everywhere(lambda: read(source), folder):
        read(source)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
        remove(folder)
        folder.mkdir()


def content(path, **options):
    return load_data(
        str(path), "jsonl", "pad", 64, tokenizer=load_tokenizer("bytes"), vocab_size=256, **options
    ).content()


def test_the_contents_hash_sees_edits_order_masks_and_shares(tmp_path):
    rows = [json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)]
    versions = {
        "same": rows,
        "edited": [*rows[:5], rows[5].replace("5", "6"), *rows[6:]],
        "reordered": rows[::-1],
        "moved boundary": [rows[0].replace("text 0", "text"), *rows[1:]],
    }
    found = {}
    for name, lines in versions.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
        found[name] = content(tmp_path / f"{name}.jsonl")
    same, edited = tmp_path / "same.jsonl", tmp_path / "edited.jsonl"
    assert content(same, cache_dir=tmp_path / "c") == found["same"], "cached or not"
    found["held out"] = content(same, val_split=0.3)
    found["a mix"] = content(f"{same}:0.5,{edited}:0.5")
    found["other shares"] = content(f"{same}:0.3,{edited}:0.7")
    found["another order"] = content(f"{edited}:0.5,{same}:0.5")
    assert len(set(found.values())) == len(found), found
