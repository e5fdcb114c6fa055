"""Chats in the forms that data sets have: all of it becomes text, or the record is refused."""

import pytest

from finchtune.data.render import Layout
from finchtune.data.values import BadRecord


def joined(pieces) -> str:
    return "".join(text for text, _ in pieces)


def trained(pieces) -> str:
    return "|".join(text for text, train in pieces if train)


def chat(*messages, **beside) -> list:
    return Layout().pieces({"messages": list(messages), **beside})


def said(role, content, **more) -> dict:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_turns_are_named_and_assistant_turns_trained_on(key):
    turns = [("system", "S"), ("user", "a"), ("assistant", "b"), ("User", "c"), ("gpt", "d")]
    if key == "messages":
        record = {key: [{"role": role, "content": text} for role, text in turns]}
    else:
        record = {key: [{"from": role, "value": text} for role, text in turns]}
    pieces = Layout().pieces(record)
    assert pieces == Layout(("talk",)).pieces({"talk": record[key]})
    assert joined(pieces) == ("System: S\n\nUser: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d\n\n")
    assert trained(pieces) == " b\n\n| d\n\n"


@pytest.mark.parametrize("name", ["assistant", "gpt", "chatgpt", "bing", "bard", "model", "GPT"])
def test_the_names_of_assistants_in_use_are_known(name):
    assert trained(chat(said("human", "hi"), said(name, "hello"))) == " hello\n\n"


def test_calls_of_tools_and_their_results_are_turns():
    call = {"function": {"name": "w", "arguments": '{"x": "ä"}'}}
    pieces = chat(
        said("user", "weather?"),
        said("assistant", None, tool_calls=[call]),
        said("tool", "sunny"),
        said("assistant", "It is sunny."),
    )
    assert joined(pieces) == (
        'User: weather?\n\nAssistant: <tool_call>{"name": "w", "arguments": {"x": "ä"}}</tool_call>'
        "\n\nTool: sunny\n\nAssistant: It is sunny.\n\n"
    )
    assert trained(pieces) == (
        ' <tool_call>{"name": "w", "arguments": {"x": "ä"}}</tool_call>\n\n| It is sunny.\n\n'
    )


def test_a_call_stands_behind_what_is_said_with_it():
    call = {"name": "w", "arguments": "x"}
    pieces = chat(said("user", "?"), said("assistant", "Wait.", function_call=call))
    assert trained(pieces) == (' Wait.\n<tool_call>{"name": "w", "arguments": "x"}</tool_call>\n\n')


def test_lists_of_text_parts_are_their_texts():
    parts = [{"type": "text", "text": "hi"}, " there", {"text": "!"}]
    assert joined(chat(said("user", parts))) == "User: hi there!\n\n"


def test_a_system_text_beside_a_chat_is_its_first_message():
    assert joined(chat(said("user", "a"), system="S")) == "System: S\n\nUser: a\n\n"


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"weight": 0}, " d\n\n"),
        ({"weight": 1}, " b\n\n| d\n\n"),
        ({"train": False}, " d\n\n"),
        ({"train": None}, " b\n\n| d\n\n"),
    ],
)
def test_weight_and_train_say_what_is_trained_on(more, expected):
    turns = [said("user", "a"), said("assistant", "b", **more), said("user", "c")]
    assert trained(chat(*turns, said("assistant", "d"))) == expected
    assert trained(chat(said("user", "a", train=True), said("gpt", "b"))) == "User: a\n\n| b\n\n"


TURN = said("user", "a")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": "hi"}, "'messages' must be a list of messages, but it is a string"),
        ({"messages": []}, "a list of messages, but it is an empty list"),
        ({"messages": ["hi"]}, "messages[0] must be an object, but it is a string"),
        ({"messages": [{"role": "user"}]}, "messages[0]: there is no field 'content'"),
        ({"messages": [{"text": "a"}]}, "messages[0]: there is no field 'from'"),
        ({"messages": [said("wizard", "a")]}, "messages[0]: the role 'wizard' is none of system"),
        ({"messages": [said("user", None)]}, "'content' must be a string, but it is null"),
        (
            {"messages": [said("user", [{"type": "image_url"}])]},
            "content[0] is of the type 'image_",
        ),
        ({"messages": [said("user", [{"type": "text"}])]}, "content[0]: there is no field 'text'"),
        ({"messages": [said("user", [3])]}, "content[0] must be a text part, but it is a number"),
        ({"messages": [TURN, said("gpt", "b", weight=0.5)]}, "'weight' must be 0 or 1, not 0.5"),
        ({"messages": [said("gpt", "b", weight="1")]}, "'weight' must be 0 or 1, not '1'"),
        ({"messages": [said("gpt", "b", weight=1, train=False)]}, "contradict each other"),
        ({"messages": [said("gpt", "b", reasoning_content="c")]}, "'reasoning_content' would be"),
        ({"messages": [said("gpt", None, tool_calls=["f"])]}, "a tool call must be an object with"),
        ({"messages": [said("gpt", None, tool_calls={})]}, "'content' must be a string, but it is"),
        ({"messages": [said("gpt", None, tool_calls="f")]}, "'tool_calls' must be a list, but it"),
        ({"messages": [TURN], "tools": [{}]}, "the field 'tools' beside 'messages' would be left"),
    ],
)
def test_what_would_be_left_out_is_refused(record, message):
    with pytest.raises(BadRecord) as error:
        Layout().pieces(record)
    assert message in str(error.value)


def test_a_chat_under_another_field_is_named_as_it_is():
    with pytest.raises(BadRecord, match=r"talk\[0\]: there is no field 'from'"):
        Layout(("talk",)).pieces({"talk": [{}]})
