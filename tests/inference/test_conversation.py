"""Conversations: every turn is read once, and as a model in training would have read it."""

import itertools

import pytest
from helpers.support import small_model

from finchtune.data import templates
from finchtune.errors import UserError
from finchtune.inference.conversation import Conversation, content_of, encode_turns
from finchtune.inference.engine import Engine, Request
from finchtune.inference.sampling import Sampling
from finchtune.tokenizer import BytesTokenizer

TOKENIZER = BytesTokenizer()


def conversation(name="chat", model=None, **settings):
    engine = Engine(model or small_model(), TOKENIZER, max_rows=1)
    return Conversation(engine, templates.get(name), Sampling(**settings), max_tokens=12)


def from_scratch(talk, messages):
    """What the model writes after all these messages, read in one go."""
    engine = Engine(small_model(), TOKENIZER)
    ids = encode_turns(TOKENIZER, talk.template.turns(messages, ask=True))
    row = engine.submit(Request(ids, 12, stop_strings=talk.template.stop))
    while not engine.idle:
        engine.step()
    return content_of(talk.template, row.text)


@pytest.mark.parametrize("name", ["chat", "metamath", "rwkv-peft"])
def test_each_answer_is_that_of_the_whole_conversation(name):
    talk = conversation(name)
    for question in ("Who?", "And why?", "When?"):
        before = [*talk.messages, {"role": "user", "content": question}]
        answer = "".join(talk.ask(question))
        assert talk.messages[:-1] == before
        assert talk.messages[-1]["content"] == content_of(talk.template, answer)
        assert talk.messages[-1]["content"] == from_scratch(talk, before)


def test_what_was_read_is_not_read_again():
    talk, read = conversation(), []
    advance = talk.engine.form.advance

    def counted(tokens, *rest):
        if rest[1:]:
            read.append(tokens.numel())
        return advance(tokens, *rest)

    talk.engine.form.advance = counted
    for question in ("a" * 300, "b", "c"):
        list(talk.ask(question))
    assert read[0] > 300
    assert all(n < 60 for n in read[1:])


def test_retry_answers_the_same_question_again():
    talk = conversation()
    first = ["".join(talk.ask(question)) for question in ("Who?", "Why?")]
    messages = [dict(message) for message in talk.messages]
    assert "".join(talk.retry()) == first[1]
    assert talk.messages == messages
    list(talk.ask("When?"))
    assert talk.messages[-1]["content"] == from_scratch(talk, talk.messages[:-1])
    random = conversation(temperature=3.0)
    list(random.ask("Who?"))
    answers = {"".join(random.retry()) for _ in range(5)}
    assert len(answers) > 1
    assert len(random.messages) == 2
    with pytest.raises(UserError, match="no question to answer again"):
        conversation().retry()


def test_a_conversation_goes_on_from_its_record():
    talk = conversation()
    list(talk.ask("Who?"))
    other = conversation()
    other.restore(talk.record(), "file")
    assert "".join(other.ask("Why?")) == "".join(talk.ask("Why?"))
    talk.reset()
    assert "".join(talk.ask("Who?")) == "".join(conversation().ask("Who?"))


def test_an_answer_cut_short_stays_as_far_as_it_got():
    talk = conversation()
    answer = talk.ask("Who?")
    begin = "".join(itertools.islice(answer, 5))
    answer.close()
    assert content_of(talk.template, begin) == talk.messages[-1]["content"]
    assert talk.engine.idle
    before = [*talk.messages, {"role": "user", "content": "Why?"}]
    assert content_of(talk.template, "".join(talk.ask("Why?"))) == from_scratch(talk, before)


@pytest.mark.parametrize(
    ("name", "text", "content"),
    [
        ("chat", " Hello.\n\n", "Hello."),
        ("chat", " Hello.\n", "Hello."),
        ("chat", "Hello.", "Hello."),
        ("metamath", "\nHello. ", "\nHello. "),
        ("rwkv-peft", "Hello.\n", "Hello."),
    ],
)
def test_content_is_what_the_template_wraps(name, text, content):
    assert content_of(templates.get(name), text) == content


@pytest.mark.parametrize("record", [[], {}, {"format": "finchtune chat 1", "messages": [{}]}])
def test_what_is_no_record_is_refused(record):
    with pytest.raises(UserError, match=r"^file: "):
        conversation().restore(record, "file")
