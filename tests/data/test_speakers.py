"""Where the turns of plain text begin, and which of them are trained on."""

import pytest

from finchtune.data.render import Layout
from finchtune.data.speakers import PAIRS, parse_pairs, split_turns
from finchtune.errors import UserError


def trained(text, pairs=PAIRS) -> str:
    pieces = split_turns(text, pairs)
    assert "".join(part for part, _ in pieces) == text
    return "|".join(part for part, train in pieces if train)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: d", " b\n\n| d"),
        ("Assistant: only", " only"),
        ("User: no answer", ""),
        ("no speaker at all", ""),
        ("User: a\nAssistant: b\nUser: c\nAssistant: d", " b\n| d"),
        ("User: a\n\nAssistant: b\n\nAssistant: c", " b\n\n| c"),
        ("System: s\n\nUser: a\n\nAssistant: b", " b"),
    ],
)
def test_what_follows_the_assistant_is_trained_on(text, expected):
    assert trained(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("User: is it Super User: a site?\n\nAssistant: Super User: it is.", " Super User: it is."),
        ("User: say Assistant: x\n\nAssistant: y", " y"),
        ("User: a\n\nAssistant:User: c", "User: c"),
        ("Assistant: x Assistant: y User: z", " x Assistant: y User: z"),
        ("User: a\n\nAssistant: b\nQuestion: c\nAnswer: d", " b\nQuestion: c\nAnswer: d"),
        ("User: SuperUser: x\n\nAssistant: SuperAssistant: y", " SuperAssistant: y"),
    ],
)  # fmt: skip
def test_a_name_counts_only_at_the_start_of_a_turn(text, expected):
    assert trained(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Human: a\n\nAssistant: b", " b"),
        ("Instruction: classify\n\nInput: abc\n\nResponse: letters", " letters"),
        ("Question: what is 1+1?\n\nAnswer: 2", " 2"),
        ("Q: what is 1+1?\n\nA: 2", " 2"),
        ("\nBob: 1+1=?\n\nAlice: 2\n", " 2\n"),
        ("Below is a task.\n\n### Instruction:\nadd\n\n### Response:\n3", "\n3"),
        ("Q: is User: a name?\nA: yes\nQ: sure?\nA: no", " yes\n| no"),
    ],
)
def test_the_usual_pairs_are_known(text, expected):
    assert trained(text) == expected


def test_other_pairs_can_be_given_and_then_count_alone():
    pairs = parse_pairs(["Customer/Agent", "Frau M./Herr A."])
    assert trained("Customer: a\nAgent: b", pairs) == " b"
    assert trained("Frau M.: a\nHerr A.: b", pairs) == " b"
    assert trained("User: a\nAssistant: b", pairs) == ""
    assert parse_pairs([]) == PAIRS


@pytest.mark.parametrize("word", ["Agent", "/Agent", "Customer/", "A/A"])
def test_what_is_no_pair_is_told(word):
    with pytest.raises(UserError, match=f"`speakers` {word}: give who asks and who answers"):
        parse_pairs([word])


def test_split_text_and_messages_agree():
    turns = [("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    chat = Layout().pieces(record)
    text = "".join(part for part, _ in chat)
    assert Layout(qa=True).pieces({"text": text}) == chat
