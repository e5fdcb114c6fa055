"""Templates in the languages of the runtimes: Jinja, and Ollama's.

Both must give the text that finchtune.data.templates gives, which training saw.
"""

import json
import re

from finchtune.data.templates import Template

NEWLINE = "\n"
PLACE = re.compile(r"\{(?:question|system|result|answer)\}")


def jinja_of(template: Template) -> str:
    """The chat template of GGUF and Hugging Face, which have no place for a question's input."""
    turns = {
        "system": around(template.system),
        "user": around(template.user),
        "tool": around(template.tool),
        "assistant": around(template.cue + template.answer),
    }
    text = "{%- if messages and messages[0]['role'] != 'system' -%}"
    text += f"{{{{ {quoted(template.opening)} }}}}{{%- endif -%}}"
    text += "{%- for message in messages -%}"
    for number, (role, (before, after)) in enumerate(turns.items()):
        test = "elif" if number else "if"
        text += f"{{%- {test} message['role'] == '{role}' -%}}"
        text += f"{{{{ {quoted(before)} + {said(template)} + {quoted(after)} }}}}"
        if role == "assistant" and template.separator:
            text += "{%- if not loop.last or add_generation_prompt -%}"
            text += f"{{{{ {quoted(template.separator)} }}}}{{%- endif -%}}"
    text += "{%- endif -%}{%- endfor -%}"
    return (
        text + f"{{%- if add_generation_prompt -%}}{{{{ {quoted(template.cue)} }}}}{{%- endif -%}}"
    )


def ollama_of(template: Template) -> str:
    """The same as the TEMPLATE of an Ollama Modelfile, in Go's language for templates.

    That cannot take blank lines out: they stay where the template has none.
    """
    system, user = around(template.system), around(template.user)
    answer = around(template.cue + template.answer)
    opening = plain(template.opening)
    opening = f"{{{{- if not .System }}}}{opening}{{{{- end }}}}" if opening else ""
    told = f"{plain(system[0])}{{{{ .System }}}}{plain(system[1])}"
    told = f"{{{{- if .System }}}}{told}{{{{- end }}}}"
    asked = f"{plain(user[0])}{{{{ .Prompt }}}}{plain(user[1])}"
    before = plain(answer[0].removeprefix(template.cue))
    answered = f"{plain(template.cue)}{before}{{{{ .Response }}}}{plain(answer[1])}"
    return opening + told + asked + answered


def said(template: Template) -> str:
    """A message's content in Jinja, without blank lines (up to eight in a row) where need be.

    With no more than filters that every runtime's Jinja has.
    """
    content = "message['content']"
    if template.blank_lines:
        return content
    return f"({content} | trim{3 * f' | replace({quoted(2 * NEWLINE)}, {quoted(NEWLINE)})'})"


def around(form: str) -> tuple[str, str]:
    """What stands before and after a form's one placeholder."""
    before, after = PLACE.split(form, maxsplit=1)
    return before, after


def quoted(text: str) -> str:
    """A string in Jinja."""
    return json.dumps(text, ensure_ascii=False)


def plain(text: str) -> str:
    """Text that Go's templates leave as it is, whatever stands beside it."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
