"""Which text a record becomes, and which part of it is trained on."""

import pytest

from finchtune.data.render import PROMPT, BadRecord, Layout

QUESTION = "What is 1 + 1?"


def joined(pieces) -> str:
    return "".join(text for text, _ in pieces)


def trained(pieces) -> str:
    return "|".join(text for text, train in pieces if train)


def test_the_prompt_is_that_of_the_evaluation():
    assert PROMPT.format(question=QUESTION) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nWhat is 1 + 1?\n\n### Response: Let's think "
        "step by step."
    )


def test_plain_text_is_one_piece_trained_on():
    assert Layout().pieces({"text": "User: a\n\nAssistant: b"}) == [
        ("User: a\n\nAssistant: b", True)
    ]
    assert Layout(("body",)).pieces({"body": "a", "text": 3}) == [("a", True)]
    assert Layout().pieces({"text": ""}) == []


@pytest.mark.parametrize("names", [("question", "answer"), ("query", "response")])
def test_an_answer_follows_its_prompt_and_alone_is_trained_on(names):
    pieces = Layout(names).pieces({names[0]: QUESTION, names[1]: "2 {x}", "other": 1})
    assert pieces == [(PROMPT.format(question=QUESTION), False), ("2 {x}", True)]


@pytest.mark.parametrize(("given", "asked"), [("[1, 2]", "Sort:\n[1, 2]"), ("", "Sort:")])
def test_an_instruction_is_followed_by_its_input_if_there_is_one(given, asked):
    record = {"instruction": "Sort:", "input": given, "output": "done"}
    pieces = Layout(("instruction", "input", "output")).pieces(record)
    assert pieces == [(PROMPT.format(question=asked), False), ("done", True)]


def test_braces_in_a_question_stay_as_they_are():
    pieces = Layout(("question", "answer")).pieces({"question": "{question} {0}", "answer": "x"})
    assert "\n{question} {0}\n" in pieces[0][0]


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_turns_are_named_and_assistant_turns_trained_on(key):
    if key == "messages":
        turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("User", "c"), ("gpt", "d")]
        record = {key: [{"role": role, "content": text} for role, text in turns]}
    else:
        turns = [("system", "S"), ("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d")]
        record = {key: [{"from": role, "value": text} for role, text in turns]}
    pieces = Layout().pieces(record)
    assert pieces == Layout(("talk",)).pieces({"talk": record[key]})
    assert joined(pieces) == ("System: S\n\nUser: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d\n\n")
    assert trained(pieces) == " b\n\n| d\n\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d", " b\n\n| d"),
        ("Assistant: only", " only"),
        ("User: no answer", ""),
        ("User: a\nAssistant:User: c", ""),
        ("Assistant: x Assistant: y User: z", " x Assistant: y "),
    ],
)
def test_split_plain_text_trains_from_assistant_to_the_next_user(text, expected):
    pieces = Layout(split_turns=True).pieces({"text": text})
    assert joined(pieces) == text
    assert trained(pieces) == expected


def test_split_text_and_messages_agree():
    record = {
        "messages": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ]
    }
    chat = Layout().pieces(record)
    split = Layout(split_turns=True).pieces({"text": joined(chat)})
    assert trained(split) == trained(chat) == " b\n\n"


QA = Layout(("question", "answer"))


@pytest.mark.parametrize(
    ("layout", "record", "message"),
    [
        (QA, [], "a JSON object is needed, but this is an empty list"),
        (QA, None, "a JSON object is needed, but this is null"),
        (QA, 3, "a JSON object is needed, but this is a number"),
        (QA, True, "a JSON object is needed, but this is a boolean"),
        (QA, {}, "there is no field 'question'; the fields are none"),
        (QA, {"question": "a", "reply": "b"}, "no field 'answer'; the fields are 'question', 'rep"),
        (QA, {"question": "a", "answer": 4}, "the field 'answer' must be a string, but it is a nu"),
        (QA, {"question": "a", "answer": None}, "'answer' must be a string, but it is null"),
        (QA, {"question": "a", "answer": " \n"}, "the field 'answer' is empty"),
        (QA, {"question": "", "answer": "b"}, "the field 'question' is empty"),
        (Layout(), {"text": ["a"]}, "the field 'text' must be a string, but it is a list"),
        (Layout(("talk",)), {"talk": [{}]}, "talk[0]: there is no field 'from'"),
        (Layout(), {"Text": "a"}, "there is no field 'text'; the fields are 'Text'"),
        (Layout(), {"messages": "hi"}, "'messages' must be a list of messages, but it is a str"),
        (Layout(), {"messages": []}, "a list of messages, but it is an empty list"),
        (Layout(), {"messages": ["hi"]}, "messages[0] must be an object, but it is a string"),
        (Layout(), {"messages": [{"role": "user"}]}, "messages[0]: there is no field 'content'"),
        (Layout(), {"messages": [{"text": "a"}]}, "messages[0]: there is no field 'from'"),
        (
            Layout(),
            {"messages": [{"role": "tool", "content": "a"}]},
            "messages[0]: the role 'tool' is none of system, user, human, assistant, gpt",
        ),
    ],
)
def test_records_that_fit_no_layout_are_refused_with_the_reason(layout, record, message):
    with pytest.raises(BadRecord) as error:
        layout.pieces(record)
    assert message in str(error.value)
