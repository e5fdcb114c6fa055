"""Which text a record becomes, and which part of it is trained on."""

from dataclasses import replace

import pytest

from finchtune.data import templates
from finchtune.data.records import parse_line
from finchtune.data.render import Layout
from finchtune.data.values import BadRecord

QUESTION = "What is 1 + 1?"
METAMATH = templates.get("metamath")


def test_plain_text_is_one_piece_trained_on():
    assert Layout().pieces({"text": "User: a\n\nAssistant: b"}) == [
        ("User: a\n\nAssistant: b", True)
    ]
    assert Layout(("body",)).pieces({"body": "a", "text": 3}) == [("a", True)]
    assert Layout().pieces({"text": ""}) == []


@pytest.mark.parametrize("names", [("question", "answer"), ("query", "response")])
def test_an_answer_follows_its_prompt_and_alone_is_trained_on(names):
    pieces = Layout(names).pieces({names[0]: QUESTION, names[1]: "2 {x}", "other": 1})
    assert pieces == [(METAMATH.prompt(QUESTION), False), ("2 {x}", True)]


@pytest.mark.parametrize(("given", "asked"), [("[1, 2]", "Sort:\n[1, 2]"), ("", "Sort:")])
def test_an_instruction_is_followed_by_its_input_if_there_is_one(given, asked):
    record = {"instruction": "Sort:", "input": given, "output": "done"}
    pieces = Layout(("instruction", "input", "output")).pieces(record)
    assert pieces == [(METAMATH.prompt(asked), False), ("done", True)]


def test_braces_in_a_question_stay_as_they_are():
    pieces = Layout(("question", "answer")).pieces({"question": "{question} {0}", "answer": "x"})
    assert "\n{question} {0}\n" in pieces[0][0]


QA = Layout(("question", "answer"))
ALPACA = Layout(("instruction", "input", "output"))


@pytest.mark.parametrize("record", [{}, {"input": None}, {"input": ""}])
def test_an_input_that_is_missing_or_null_is_empty(record):
    pieces = ALPACA.pieces({"instruction": "Say hi", "output": "hi"} | record)
    assert pieces == [(METAMATH.prompt("Say hi"), False), ("hi", True)]


def test_a_chosen_template_puts_questions():
    chat = replace(ALPACA, template=templates.get("alpaca"))
    pieces = chat.pieces({"instruction": "Add", "input": "1 2", "output": "3"})
    assert pieces == [(templates.get("alpaca").prompt("Add", "1 2"), False), ("3", True)]


@pytest.mark.parametrize(
    ("line", "text"),
    [("42", "42"), ("true", "true"), ("1.10", "1.10"), ("1e3", "1e3"), ("-0.0", "-0.0"),
     ("123456789012345678901", "123456789012345678901")],
)  # fmt: skip
def test_numbers_and_truth_values_are_the_text_that_was_written(line, text):
    record = parse_line(f'{{"question": "6*7?", "answer": {line}}}'.encode())
    assert QA.pieces(record)[1] == (text, True)


@pytest.mark.parametrize(
    ("layout", "record", "message"),
    [
        (QA, [], "a JSON object is needed, but this is an empty list"),
        (QA, None, "a JSON object is needed, but this is null"),
        (QA, 3, "a JSON object is needed, but this is a number"),
        (QA, True, "a JSON object is needed, but this is a boolean"),
        (QA, {}, "there is no field 'question'; the fields are none"),
        (QA, {"question": "a", "reply": "b"}, "no field 'answer'; the fields are 'question', 'rep"),
        (QA, {"question": "a", "answer": ["b", "c"]}, "it is a list; choose one of its values, or"),
        (QA, {"question": "a", "answer": None}, "'answer' must be a string, but it is null"),
        (QA, {"question": "a", "answer": " \n"}, "the field 'answer' is empty"),
        (QA, {"question": "", "answer": "b"}, "the field 'question' is empty"),
        (Layout(), {"text": ["a"]}, "the field 'text' must be a string, but it is a list"),
        (Layout(), {"Text": "a"}, "there is no field 'text'; the fields are 'Text'"),
        (ALPACA, {"instruction": "a", "inputs": "b", "output": "c"}, "did you mean 'inputs'?"),
        (ALPACA, {"instruction": None, "input": "b", "output": "c"}, "a string, but it is null"),
        (ALPACA, {"instruction": "", "input": "", "output": "c"}, "'instruction' is empty"),
        (Layout(), {"instruction": "a", "output": "c"}, "those of `sft_field` instruction input"),
    ],
)
def test_records_that_fit_no_layout_are_refused_with_the_reason(layout, record, message):
    with pytest.raises(BadRecord) as error:
        layout.pieces(record)
    assert message in str(error.value)
