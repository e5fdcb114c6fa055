"""What a template makes of questions and chats, and what its file may hold."""

import json

import pytest

from finchtune.data import templates
from finchtune.errors import UserError

TASK = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
)
CHAT = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("metamath", TASK + "### Instruction:\nQ\n\n### Response: Let's think step by step."),
        ("alpaca", TASK + "### Instruction:\nQ\n\n### Response:"),
        ("rwkv-peft", TASK + "### Instruction:\nQ\n\n### Response:"),
        ("chat", "User: Q\n\nAssistant:"),
        ("think", "User: Q\n\nAssistant: <think"),
        ("no-think", "User: Q\n\nAssistant: <think></think"),
    ],
)
def test_a_question_is_put_as_its_template_says(name, prompt):
    assert templates.get(name).prompt(question="Q") == prompt


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("metamath", TASK + "### Instruction:\nQ\nI\n\n### Response: Let's think step by step."),
        ("alpaca", WITH_INPUT + "### Instruction:\nQ\n\n### Input:\nI\n\n### Response:"),
        ("chat", "User: Q\nI\n\nAssistant:"),
    ],
)
def test_an_input_follows_its_question(name, prompt):
    assert templates.get(name).prompt("Q", input="I") == prompt


def test_a_system_text_stands_in_place_of_the_opening():
    assert templates.get("chat").prompt("Q", system="S") == "System: S\n\nUser: Q\n\nAssistant:"
    found = templates.get("alpaca").prompt("Q", input="I", system="S")
    assert found == "S\n\n### Instruction:\nQ\n\n### Input:\nI\n\n### Response:"


@pytest.mark.parametrize(
    ("name", "pieces"),
    [
        (
            "chat",
            [
                ("User: a\n\nAssistant:", False),
                (" b\n\n", True),
                ("User: c\n\nAssistant:", False),
                (" d\n\n", True),
            ],
        ),
        (
            "rwkv-peft",
            [
                (TASK + "### Instruction:\na\n\n### Response:", False),
                ("b\n\x17", True),
                ("\n\n### Instruction:\nc\n\n### Response:", False),
                ("d\n\x17", True),
            ],
        ),
    ],
)
def test_a_chat_is_cut_where_training_begins_and_ends(name, pieces):
    assert templates.get(name).turns(CHAT) == pieces


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_what_a_model_continues_is_what_it_was_trained_on(name):
    template = templates.get(name)
    trained = template.turns(CHAT)
    assert template.prompt("a") == trained[0][0]
    asked = "".join(text for text, _ in template.turns(CHAT[:3], ask=True))
    assert asked == "".join(text for text, _ in trained[:3])
    assert not any(stop in text for stop in template.stop for text in ("b", "d"))


def test_a_message_says_whether_it_is_trained_on():
    chat = [CHAT[0], CHAT[1] | {"trained": False}, CHAT[2] | {"trained": True}, CHAT[3]]
    assert templates.get("chat").turns(chat) == [
        ("User: a\n\nAssistant: b\n\n", False),
        ("User: c\n\n", True),
        ("Assistant:", False),
        (" d\n\n", True),
    ]


def test_braces_in_what_is_said_stay_as_they_are():
    found = templates.get("alpaca").prompt("{input} {0}", input="{question}")
    assert "### Instruction:\n{input} {0}\n\n### Input:\n{question}\n" in found


@pytest.mark.parametrize("name", templates.TEMPLATES)
def test_a_record_gives_the_template_again(name):
    template = templates.get(name)
    assert templates.from_record(json.loads(json.dumps(template.record()))) == template


def test_a_file_is_a_template(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text('user: |\n  Q: {question}\ncue: "A:"\nanswer: " {answer}\\n"\nstop: ["Q:"]\n')
    template = templates.get(str(path))
    assert (template.name, template.stop) == ("mine", ("Q:",))
    assert template.turns(CHAT[:2]) == [("Q: a\nA:", False), (" b\n", True)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user: [", "mine.yaml: not a readable template: "),
        ("- a", "mine.yaml: a template needs at least the field 'user'"),
        ("cue: a", "mine.yaml: a template needs at least the field 'user'"),
        ("user: hello", "mine.yaml: 'user' must hold {question}"),
        ("user: '{question}'\nanswer: x", "mine.yaml: 'answer' must hold {answer}"),
        ("user: '{question}'\ninput: x", "mine.yaml: 'input' must hold {input}"),
        (
            "user: '{question}'\nend: x",
            "mine.yaml: unknown field 'end'; known are answer, blank",
        ),
        ("user: '{question}'\ncue: 3", "mine.yaml: 'cue' must be a string"),
        ("user: '{question}'\nstop: x", "mine.yaml: 'stop' must be a list of strings"),
        ("user: '{question}'\nstop: ['']", "mine.yaml: an empty string in 'stop'"),
        (b"user: \xff", "mine.yaml: not a readable template: "),
        (b"user: \x00", "mine.yaml: not a readable template: "),
        ("[" * 10_000, "mine.yaml: not a readable template: "),
        ("a: &a [x,x]\nuser: [" + "*a," * 9 + "]", "aliases (*name) are not read"),
    ],
)
def test_a_bad_file_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        templates.get(str(path))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_name_is_told_with_the_near_one():
    with pytest.raises(UserError, match=r"`template` metamth: did you mean metamath\?"):
        templates.get("metamth")


@pytest.mark.parametrize("name", ["think", "no-think"])
def test_no_turn_of_a_thinking_model_holds_a_blank_line(name):
    said = [
        {"role": "system", "content": "Be\n\nbrief."},
        {"role": "user", "content": "a\n\n\nb\n", "input": "c\n\nd"},
        {"role": "assistant", "content": "thought</think>\ne\n\nf"},
    ]
    cue = templates.get(name).cue
    text = "".join(text for text, _ in templates.get(name).turns(said))
    assert text == f"System: Be\nbrief.\n\nUser: a\nb\nc\nd\n\n{cue}>thought</think>\ne\nf\n\n"
    assert "a\n\n\nb" in templates.get("chat").prompt(question="a\n\n\nb")


def test_blank_lines_of_a_file_are_true_or_false(tmp_path):
    (tmp_path / "t.yaml").write_text("user: '{question}'\nblank_lines: false")
    made = templates.get(str(tmp_path / "t.yaml"))
    assert made.prompt(question="a\n\nb") == "a\nb"
    assert templates.from_record(made.record()) == made
    (tmp_path / "t.yaml").write_text("user: '{question}'\nblank_lines: none")
    with pytest.raises(UserError, match="'blank_lines' must be true or false"):
        templates.get(str(tmp_path / "t.yaml"))
