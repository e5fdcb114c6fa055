"""The World tokenizer against the Python trie it was published with; streaming against decode."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rwkv
from hypothesis import given, settings
from hypothesis import strategies as st
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

from finchtune.errors import UserError
from finchtune.tokenizer import BytesTokenizer, Decoder, WorldTokenizer, load_tokenizer
from finchtune.tokenizer.world_trie import WorldTrie, build_states, kept_states, load_library

TEXT = "Finch 芬奇 🐦\n\n\tdef f(x):\n        return x ** 2  # naïve  \r\n"
VOCABULARY = Path(rwkv.__file__).parent / "rwkv_vocab_v20230424.txt"
U2 = np.dtype("<u2")
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.fixture(scope="module")
def world():
    tokenizer = load_tokenizer("world")
    assert tokenizer.encode("") == tokenizer.encode_array("", U2).tolist() == []
    return tokenizer


@pytest.fixture(scope="module")
def trie():
    return TRIE_TOKENIZER(str(VOCABULARY))


@given(text=any_text)
@settings(max_examples=200)
def test_world_encodes_like_the_published_trie(world, trie, text):
    assert world.encode(text) == world.encode_array(text, U2).tolist() == trie.encode(text)


def test_long_and_repeated_text_encodes_like_the_published_trie(world, trie):
    text = TEXT * 50 + " " * 300 + "\0" * 9 + "=" * 200 + "aaab" * 40
    assert world.encode_array(text, U2).tolist() == trie.encode(text)


def test_every_world_token_is_one_token(world):
    table = [world.id_bytes(id) for id in range(65536)]
    compiled = WorldTrie(load_library(), build_states(load_library(), table))
    for id, token in enumerate(table):
        if token:
            assert compiled.encode([token], [False])[0].tolist() == [id]


def test_a_byte_outside_a_vocabulary_is_named():
    library = load_library()
    trie = WorldTrie(library, build_states(library, [b"", b"a", b"ab", b"abc"]))
    ids, sizes = trie.encode([b"ababcaab", b"", b"a"], [True, False, True])
    assert ids.tolist() == [2, 3, 1, 2, 0, 1, 0]
    assert sizes.tolist() == [5, 0, 2]
    with pytest.raises(UserError, match="no token of the vocabulary begins with byte 0x62 at 3"):
        trie.encode([b"aabba"], [False])


def test_a_vocabularys_trie_is_kept_and_made_again_where_damaged(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("1 'a' 1\n")
    asked = []

    def states():
        return kept_states(load_library(), vocabulary, lambda: asked.append(1) or [b"", b"a"])

    first = states()
    assert states().tobytes() == first.tobytes()
    assert len(asked) == 1
    (kept,) = (tmp_path / "finchtune").glob("finchtune_world_states_*.bin")
    raw = bytearray(kept.read_bytes())
    raw[100] ^= 1
    kept.write_bytes(raw)
    assert states().tobytes() == first.tobytes()
    assert len(asked) == 2
    vocabulary.write_text("2 'a' 1\n")
    states()
    assert len(asked) == 3


@pytest.mark.parametrize("spec", ["world", "bytes"])
def test_text_divided_at_the_last_cut_has_the_same_tokens(spec, world):
    tokenizer = load_tokenizer(spec)
    raw = (TEXT * 3 + "\n\n  def f(x):\n\treturn 芬\n" * 5).encode()
    cuts = set()
    for end in range(1, len(raw)):
        cut = tokenizer.last_cut(raw[:end])
        assert 0 <= cut < end
        cuts.add(cut)
    assert len(cuts) > 50
    whole = tokenizer.encode(raw.decode())
    for cut in cuts:
        parts = raw[:cut].decode(), raw[cut:].decode()
        assert [id for part in parts for id in tokenizer.encode(part)] == whole


def test_without_a_compiler_arrays_are_the_same_and_a_warning_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    load_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="twice as long without g"):
            assert WorldTokenizer().encode_array(TEXT, U2).tolist() == WorldTokenizer().encode(TEXT)
    finally:
        load_library.cache_clear()


def test_world_tokens_have_the_published_bytes(world, trie):
    for id, token in trie.idx2token.items():
        assert world.id_bytes(id) == token
    assert [world.id_bytes(id) for id in (0, 65530, 65535)] == [b"", b"", b""]


def test_a_world_vocabulary_file_is_read_as_such(world):
    assert load_tokenizer(str(VOCABULARY)).encode(TEXT) == world.encode(TEXT)


@pytest.mark.parametrize("spec", ["world", "bytes", "bpe"])
def test_decode_undoes_encode(spec, byte_level_bpe):
    tokenizer = load_tokenizer(byte_level_bpe if spec == "bpe" else spec)
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("") == []


@pytest.mark.parametrize("spec", ["world", "bytes", "bpe"])
def test_streamed_text_is_complete_characters_and_adds_up(spec, byte_level_bpe):
    tokenizer = load_tokenizer(byte_level_bpe if spec == "bpe" else spec)
    ids = tokenizer.encode(TEXT)[:-1] + tokenizer.encode("🐦")[:-1]
    decoder = Decoder(tokenizer)
    parts = [decoder.feed(id) for id in ids]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) + decoder.finish() == tokenizer.decode(ids)
    assert tokenizer.decode(ids).endswith("\ufffd")


@pytest.mark.parametrize("spec", ["world", "bytes"])
def test_a_character_cut_anywhere_waits_for_its_rest(spec):
    """At every split point of the bytes: what is complete is given at once, and nothing else."""
    tokenizer = load_tokenizer(spec)
    raw = "aé芬🐦\u0301z".encode()
    ids = [next(id for id in range(257) if tokenizer.id_bytes(id) == bytes([b])) for b in raw]
    for cut in range(len(raw) + 1):
        decoder = Decoder(tokenizer)
        first = decoder.feed(*ids[:cut])
        assert first == raw[:cut].decode(errors="ignore")
        assert first + decoder.feed(*ids[cut:]) == raw.decode()
        assert decoder.finish() == ""


def test_every_world_id_decodes_alone_as_it_streams(world):
    for id in range(65536):
        decoder = Decoder(world)
        text = decoder.feed(id) + decoder.finish()
        assert text == world.decode([id]) == world.id_bytes(id).decode(errors="replace")


@given(ids=st.lists(st.integers(0, 65535), max_size=20))
@settings(max_examples=100)
def test_any_world_ids_stream_to_what_they_decode_to(world, ids):
    decoder = Decoder(world)
    assert "".join(map(decoder.feed, ids)) + decoder.finish() == world.decode(ids)


@pytest.mark.parametrize(("vocab_size", "name"), [(65536, "world"), (256, "bytes")])
def test_the_vocabulary_size_names_the_tokenizer(vocab_size, name):
    assert load_tokenizer(None, vocab_size).name == name


@pytest.mark.parametrize(
    ("spec", "vocab_size", "message"),
    [
        (None, 50277, "no tokenizer is known for a vocabulary of 50277; pass `tokenizer`"),
        (None, None, "no tokenizer is known"),
        ("world", 50277, "`tokenizer` world has 65536 tokens, but the model only 50277"),
        ("no_such.json", None, "`tokenizer` no_such.json: no such file"),
    ],
)
def test_tokenizers_that_do_not_fit_are_refused(spec, vocab_size, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(spec, vocab_size)


def test_files_that_are_no_vocabulary_are_refused(tmp_path):
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(UserError, match=r"broken\.json: not a tokenizer\.json"):
        load_tokenizer(str(broken))
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("1 'a' 7\n")
    with pytest.raises(UserError, match=r"vocab\.txt: not a World vocabulary: token 1 has 1"):
        load_tokenizer(str(vocabulary))


def test_a_tokenizer_whose_token_0_is_text_is_refused(byte_level_bpe, tmp_path):
    content = json.loads(Path(byte_level_bpe).read_text())
    content["added_tokens"] = []
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="token 0 must be a special token"):
        load_tokenizer(str(path))


@pytest.mark.parametrize("spec", ["world", "bytes", "bpe"])
def test_lone_surrogates_are_refused_with_their_place(spec, byte_level_bpe):
    tokenizer = load_tokenizer(byte_level_bpe if spec == "bpe" else spec)
    with pytest.raises(UserError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800c")
    with pytest.raises(UserError, match="lone surrogate at character 2"):
        tokenizer.encode_array("ab\ud800c", U2)


@pytest.mark.parametrize("id", [-1, 256])
def test_ids_outside_the_vocabulary_are_refused(id):
    with pytest.raises(UserError, match=f"token id {id} is outside the bytes vocabulary of 256"):
        BytesTokenizer().decode([65, id])


def test_importing_the_module_loads_no_tokenizer_library():
    code = "import sys, finchtune.tokenizer; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert not {"pyrwkv_tokenizer", "tokenizers", "torch"} & set(loaded.stdout.split())
