"""Templates in Jinja give the text that training saw."""

import jinja2
import pytest

from finchtune.data import templates
from finchtune.weights.forms.templates import jinja_of, ollama_of

USER, ANSWER = {"role": "user", "content": 'Say "hi"\n{x}'}, {"role": "assistant", "content": "hi"}
SYSTEM = {"role": "system", "content": "Be brief."}
LONG = {"role": "user", "content": "\na\n\n\n\nb\n\n"}
CHATS = [[USER], [SYSTEM, USER], [LONG], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER, USER, ANSWER]]


@pytest.mark.parametrize("name", templates.TEMPLATES)
@pytest.mark.parametrize("messages", CHATS, ids=len)
def test_jinja_gives_the_templates_text(name, messages):
    template = templates.get(name)
    ask = messages[-1]["role"] == "user"
    expected = "".join(text for text, _ in template.turns(messages, ask=ask))
    rendered = jinja2.Template(jinja_of(template), trim_blocks=True, lstrip_blocks=True).render(
        messages=messages, add_generation_prompt=ask
    )
    assert rendered == expected


def test_ollamas_template_has_all_parts_in_order():
    text = ollama_of(templates.get("chat"))
    parts = ['"System: "', "{{ .System", '"User: "', ".Prompt", '"Assistant:"', ".Response"]
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert '"""' not in text
