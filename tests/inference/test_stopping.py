"""Stop strings in text that grows token by token."""

import pytest

from finchtune.inference.stopping import StoppingText
from finchtune.tokenizer import BytesTokenizer, load_tokenizer


def fed(tokenizer, text, stop_strings):
    """The stream after all tokens of the text, or after the one that met a stop string."""
    stream, released = StoppingText(tokenizer, stop_strings), []
    for token in tokenizer.encode(text):
        released.append(stream.feed(token))
        if stream.stopped:
            break
    released.append(stream.finish())
    assert "".join(released) == stream.text
    return stream


@pytest.mark.parametrize("name", ["bytes", "world"])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("It is 7.\nQuestion: what", ["Question", "USER"], "It is 7.\n"),
        ("a Quest, a Questio", ["Question"], "a Quest, a Questio"),
        ("ababac", ["abac"], "ab"),
        ("one two three", ["three", "two"], "one "),
        ("héllo 芬奇 end", ["奇"], "héllo 芬"),
        ("stop", ["stop"], ""),
        ("nothing", [], "nothing"),
        ("nothing", [""], "nothing"),
    ],
)
def test_text_ends_before_the_first_stop_string(name, text, stops, expected):
    tokenizer = load_tokenizer(name)
    stream = fed(tokenizer, text, stops)
    assert stream.text == expected
    assert stream.stopped == (expected != text)
    tokens = tokenizer.encode(text)[: stream.n_tokens]
    assert expected.startswith(tokenizer.decode(tokens))


def test_only_what_may_begin_a_stop_string_is_held_back():
    stream = StoppingText(BytesTokenizer(), ["\nUser:"])
    assert [stream.feed(byte) for byte in b"ok\nUse it"] == [*"ok", *[""] * 4, "\nUse ", *"it"]


def test_an_unfinished_character_shows_at_the_end():
    stream = StoppingText(BytesTokenizer(), ["x"])
    assert [stream.feed(byte) for byte in "é".encode()[:1]] == [""]
    assert stream.finish() == "\ufffd"
