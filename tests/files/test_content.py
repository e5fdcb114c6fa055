"""Reading JSON and YAML that others wrote."""

import pytest

from finchtune.errors import UserError
from finchtune.files import read_object, read_yaml

UNFOLDING = "a: &a [x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)


def test_yaml_gives_plain_values(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("ctx_len: 512\npeft: bone\ntrain_parts: [ln, time]\n")
    assert read_yaml(path) == {"ctx_len": 512, "peft": "bone", "train_parts": ["ln", "time"]}


@pytest.mark.parametrize(
    "text", [UNFOLDING, "a: &a [*a]", "a: !!python/object:os.system {}", "[" * 10_000, "\x00", "{"]
)
def test_yaml_that_unfolds_or_is_none_is_refused(text, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml: cannot be read as YAML"):
        read_yaml(path)
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read: No such file"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{", "[" * 100_000])
def test_what_is_no_object_is_refused(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"a\.json"):
        read_object(path)
