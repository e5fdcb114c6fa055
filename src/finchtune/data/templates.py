"""Templates: the text that puts a question, or a chat, to a model, and that ends its answers.

template = templates.get("metamath")          # a name, or the path of a template file
template = templates.from_record(record)      # what `template.record()` gave earlier
template.prompt(question="1+1?")              # the text after which the answer is generated
template.turns(messages)                      # a chat as pieces, each trained on or not
template.stop                                 # text that no answer holds
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finchtune.errors import DataError, UserError
from finchtune.files import read_yaml

Piece = tuple[str, bool]
"""Text, and whether it is trained on."""

PLACEHOLDER = re.compile(r"\{(question|input|system|result|answer)\}")
MAX_FILE_BYTES = 1 << 20
SPEAKERS = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Template:
    """How a conversation becomes text: an opening, then the turns one after the other.

    A system message replaces the `opening`; `input_opening` is the one of a question with an input.
    `user` is a question's turn, and `input` stands behind it if the question has an input; without
    `input` that is put on the question's next line. `cue` begins every answer's turn and belongs to
    the prompt, `answer` is what the model is to write, and `separator` stands between an answer and
    the next turn. Generation ends where one of `stop` appears. Without `blank_lines` they are taken
    out of what is said, with all space around it, for models to which one is the end of a turn.
    """

    name: str
    opening: str = ""
    input_opening: str = ""
    system: str = "{system}\n\n"
    user: str = "{question}\n\n"
    input: str = ""
    tool: str = "Tool: {result}\n\n"
    cue: str = ""
    answer: str = "{answer}"
    separator: str = ""
    stop: tuple[str, ...] = ()
    blank_lines: bool = True

    def prompt(self, question: str, input: str = "", system: str = "") -> str:
        """The text that an answer to this question continues."""
        message = {"role": "user", "content": question, "input": input}
        messages = [{"role": "system", "content": system}] if system else []
        return "".join(text for text, _ in self.turns([*messages, message], ask=True))

    def turns(self, messages: Iterable[Mapping[str, Any]], ask: bool = False) -> list[Piece]:
        """A conversation's text in order, cut where it changes whether it is trained on.

        A message has a `role` (system, user, assistant, tool) and its `content`, a user's possibly
        an `input`, and any possibly `trained`, whether it is trained on; without that answers
        alone are. Each prompt is one piece, so it has the tokens that it has when it stands alone.
        `ask`: the next answer's cue follows, for a model to continue from.
        """
        messages = list(messages)
        pieces: list[Piece] = []
        if messages and messages[0]["role"] != "system":
            first_input = messages[0].get("input") and self.input_opening
            pieces.append((first_input or self.opening, False))
        for i, message in enumerate(messages):
            if i and messages[i - 1]["role"] == "assistant":
                pieces.append((self.separator, False))
            pieces += self._turn(message)
        if ask:
            pieces.append((self.cue, False))
        return joined(pieces)

    def _turn(self, message: Mapping[str, Any]) -> list[Piece]:
        role, content = message["role"], self._said(message["content"])
        trained = message.get("trained", role == "assistant")
        if role == "assistant":
            return [(self.cue, False), (_fill(self.answer, answer=content), trained)]
        if role == "system":
            return [(_fill(self.system, system=content), trained)]
        if role == "tool":
            return [(_fill(self.tool, result=content), trained)]
        given = self._said(message.get("input") or "")
        if given and not self.input:
            content, given = f"{content}\n{given}", ""
        form = self.user + (self.input if given else "")
        return [(_fill(form, question=content, input=given), trained)]

    def _said(self, text: str) -> str:
        return text if self.blank_lines else re.sub(r"\n{2,}", "\n", text.strip())

    def record(self) -> dict[str, Any]:
        """All of the template as JSON values, to be kept with what was made by it."""
        return dataclasses.asdict(self) | {"stop": list(self.stop)}


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces without empty ones, neighbours that are both trained on or both not made one."""
    result: list[Piece] = []
    for text, trained in pieces:
        if result and result[-1][1] == trained:
            result[-1] = (result[-1][0] + text, trained)
        elif text:
            result.append((text, trained))
    return result


def _fill(form: str, **values: str) -> str:
    """`form` with {name} replaced, in one pass: braces in the values stay as they are."""
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), form)


REQUEST = "Write a response that appropriately completes the request.\n\n"
TASK = f"Below is an instruction that describes a task. {REQUEST}"
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    f"context. {REQUEST}"
)
INSTRUCTION = "### Instruction:\n{question}\n\n"
NEXT_SPEAKER = ("Question:", "USER:", "ASSISTANT:", "Instruction:", "Response:")

TEMPLATES = {
    template.name: template
    for template in (
        # Yu et al. 2023 (arXiv:2309.12284), with which Bone was evaluated.
        Template(
            "metamath",
            opening=TASK,
            user=INSTRUCTION,
            cue="### Response: Let's think step by step.",
            separator="\n\n",
            stop=NEXT_SPEAKER,
        ),
        # Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca.
        Template(
            "alpaca",
            opening=TASK,
            input_opening=WITH_INPUT,
            user=INSTRUCTION,
            input="### Input:\n{input}\n\n",
            cue="### Response:",
            separator="\n\n",
            stop=("### Instruction:",),
        ),
        # The form of the released World models.
        Template(
            "chat",
            system="System: {system}\n\n",
            user="User: {question}\n\n",
            cue="Assistant:",
            answer=" {answer}\n\n",
            stop=("\n\nUser:",),
        ),
        # The released models that think first, and the same without their thoughts; the cue lacks
        # the bracket that begins the first token of an answer. Source: BlinkDL's model cards of
        # RWKV-7 G1.
        Template(
            "think",
            system="System: {system}\n\n",
            user="User: {question}\n\n",
            cue="Assistant: <think",
            answer=">{answer}\n\n",
            stop=("\n\nUser:",),
            blank_lines=False,
        ),
        Template(
            "no-think",
            system="System: {system}\n\n",
            user="User: {question}\n\n",
            cue="Assistant: <think></think",
            answer=">{answer}\n\n",
            stop=("\n\nUser:",),
            blank_lines=False,
        ),
        # --data_type sft of github.com/JL-er/RWKV-PEFT.
        Template(
            "rwkv-peft",
            opening=TASK,
            user=INSTRUCTION,
            cue="### Response:",
            answer="{answer}\n\x17",
            separator="\n\n",
            stop=("\x17",),
        ),
    )
}


def get(name_or_path: str) -> Template:
    """The template of this name, or in this file; UserError if there is none.

    A file is YAML or JSON: the fields of `Template`, of which `user` must be there.
    """
    if name_or_path in TEMPLATES:
        return TEMPLATES[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, TEMPLATES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"`template` {name_or_path}: {hint}it is one of {', '.join(TEMPLATES)}, or the path of "
            "a template file"
        )
    return from_record({"name": path.stem, **_read(path)}, str(path))


def from_record(record: Any, where: str = "template") -> Template:
    """The template that `Template.record` wrote; UserError, beginning with `where`, if it is none.

    Fields that are missing have their defaults.
    """
    fields = {field.name for field in dataclasses.fields(Template)}
    if not isinstance(record, dict) or "name" not in record:
        raise DataError(f"{where}: not a template: an object with its fields is needed")
    for key, value in record.items():
        if key not in fields:
            raise DataError(
                f"{where}: unknown field {key!r}; known are {', '.join(sorted(fields))}"
            )
        if key == "blank_lines":
            if not isinstance(value, bool):
                raise DataError(f"{where}: {key!r} must be true or false")
            continue
        strings = value if key == "stop" else [value]
        if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
            raise DataError(
                f"{where}: {key!r} must be {'a list of strings' if key == 'stop' else 'a string'}"
            )
    template = Template(**record | {"stop": tuple(record.get("stop", ()))})
    for key, needed in (("user", "{question}"), ("answer", "{answer}"), ("tool", "{result}")):
        if needed not in getattr(template, key):
            raise DataError(f"{where}: {key!r} must hold {needed}")
    if template.input and "{input}" not in template.input:
        raise DataError(f"{where}: 'input' must hold {{input}}")
    if "" in template.stop:
        raise DataError(f"{where}: an empty string in 'stop' would end every answer at once")
    return template


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"larger than a template of {MAX_FILE_BYTES:,} bytes can be")
        content = read_yaml(path)
    except (OSError, UserError) as error:
        reason = " ".join(str(error).removeprefix(f"{path}: ").split())
        raise DataError(f"{path}: not a readable template: {reason}") from None
    if not isinstance(content, dict) or "user" not in content:
        raise DataError(f"{path}: a template needs at least the field 'user' with {{question}}")
    return content
