"""A prepared pair says what made it, and is not used with another tokenizer or template."""

import json
import shutil

import pytest

from finchtune.data import load_data, templates
from finchtune.data.prepare import prepare
from finchtune.data.provenance import info_path, read_provenance
from finchtune.data.render import Layout
from finchtune.data.workers import Recipe
from finchtune.errors import UserError
from finchtune.tokenizer import BytesTokenizer, load_tokenizer

QA = ("question", "answer")
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def make(folder, record, layout, tokenizer="bytes") -> str:
    (folder / "in.jsonl").write_text(json.dumps(record) + "\n")
    prepare([str(folder / "in.jsonl")], str(folder / "out"), Recipe(layout, tokenizer, "<u2"))
    return str(folder / "out")


def load(prefix, tokenizer=None, template="", vocab_size=65536, **more):
    tokenizer = tokenizer or BytesTokenizer()
    return load_data(
        prefix, "binidx", "pad", 256, "qa", None, tokenizer, vocab_size, template=template, **more
    )


@pytest.fixture
def questions(tmp_path) -> str:
    return make(tmp_path, {"question": "a", "answer": "b"}, Layout(QA))


@pytest.mark.parametrize(
    ("record", "layout", "name"),
    [
        ({"text": "a"}, Layout(), None),
        ({"question": "a", "answer": "b"}, Layout(QA), "metamath"),
        ({"question": "a", "answer": "b"}, Layout(QA, template=templates.get("chat")), "chat"),
        (CHAT, Layout(), "chat"),
        (CHAT, Layout(template=templates.get("alpaca")), "alpaca"),
    ],
)
def test_the_template_that_was_used_is_kept(tmp_path, record, layout, name):
    found = read_provenance(make(tmp_path, record, layout), 1, _tokens(tmp_path))
    assert (found.tokenizer, found.tokenizer_sha256) == ("bytes", BytesTokenizer().sha256)
    assert found.template == (templates.get(name) if name else None)


def _tokens(folder) -> int:
    return (folder / "out.bin").stat().st_size // 2


def test_the_template_is_that_of_the_run(questions):
    data = load(questions)
    assert data.template == templates.get("metamath")
    assert data.describe()["template"] == templates.get("metamath").record()
    assert ("template", "metamath") in list(data.report())
    assert load(questions, template="metamath").template == data.template


def test_another_template_is_refused(questions):
    with pytest.raises(UserError, match="prepared with `template` metamath, not with this `te"):
        load(questions, template="alpaca")


def test_another_tokenizer_is_refused(questions):
    with pytest.raises(UserError, match="was prepared with `tokenizer` bytes, but this is world"):
        load(questions, load_tokenizer("world"))


def test_a_vocabulary_is_known_by_its_content(tmp_path):
    prefix = make(tmp_path, {"text": "a"}, Layout(), "world")
    world = load_tokenizer("world")
    shutil.copy(world.vocab_file, tmp_path / "mine.txt")
    load_data(prefix, "binidx", "pad", 8, tokenizer=load_tokenizer(str(tmp_path / "mine.txt")))


def test_plain_text_may_be_asked_with_any_template(tmp_path):
    prefix = make(tmp_path, {"text": "abc"}, Layout())
    data = load_data(prefix, "binidx", "pad", 8, tokenizer=BytesTokenizer(), template="alpaca")
    assert data.template == templates.get("alpaca")


def test_pairs_of_other_software_have_no_provenance(questions):
    info_path(questions).unlink()
    assert load(questions, load_tokenizer("world"), "alpaca").n_rows == 1


def test_data_sets_of_two_templates_are_refused(questions, tmp_path):
    (tmp_path / "b").mkdir()
    other = make(tmp_path / "b", CHAT, Layout())
    with pytest.raises(UserError, match=r"have different templates \(chat, metamath\)"):
        load(f"{questions},{other}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"documents": 2}, "is about 2 documents of"),
        ({"format": 9}, "not what prepare_data.py writes"),
        ({"template": {"name": "x", "cue": 3}}, "'cue' must be a string"),
        ({"tokenizer": None, "more": 1}, "not what prepare_data.py writes"),
    ],
)
def test_a_damaged_record_is_told(questions, change, message):
    content = json.loads(info_path(questions).read_text()) | change
    info_path(questions).write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        load(questions)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "3", "{}"])
def test_what_is_no_record_is_told(questions, content):
    info_path(questions).write_text(content)
    with pytest.raises(UserError, match=r"out\.info\.json"):
        load(questions)


def test_the_cache_knows_the_template(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"question": "a", "answer": "b"}))
    names = set()
    for name in ("metamath", "alpaca", "metamath", ""):
        data = load_data(
            str(source), "sft", "pad", 256, "qa", QA, BytesTokenizer(), 256,
            cache_dir=tmp_path / "cache", template=name
        )  # fmt: skip
        assert data.template == templates.get(name or "metamath")
        names.add(len(list((tmp_path / "cache").glob("*.bin"))))
    assert names == {2, 4, 6}  # "" has the content of metamath, but an entry of its own


def test_speakers_go_with_plain_text_alone(questions):
    with pytest.raises(UserError, match="`speakers` goes with `data_type` jsonl"):
        load(questions, speakers=["A/B"])
