"""The YAML file of --config: what it gives back, and what is refused."""

import dataclasses

import pytest
import yaml

from finchtune.cli.flags import parse_train_flags
from finchtune.config import config_yaml
from finchtune.errors import UserError

BASE = ["--load_model", "m.pth", "--data_file", "d"]


def parse(*words):
    return parse_train_flags([*BASE, *words])


def test_a_configuration_comes_back_from_its_yaml(tmp_path):
    words = "--peft lora --lora_r 8 --rslora 1 --train_parts time ln --micro_bsz 2 --global_bsz 8 "
    words += "--train_type infctx state"
    config = parse(*words.split(), "--sample_prompt", "a: 'b' # c")
    (tmp_path / "run.yaml").write_text(config_yaml(config))
    assert parse_train_flags(["--config", str(tmp_path / "run.yaml")]) == config
    changed = parse_train_flags(["--config", str(tmp_path / "run.yaml"), "--lora_r", "4"])
    assert changed == dataclasses.replace(config, lora_r=4), "the command line wins"


@pytest.mark.parametrize("kind", ["none", "state", "infctx"])
def test_a_configuration_comes_back_from_before_train_type_took_several_words(tmp_path, kind):
    config = parse("--peft", "bone", "--train_type", kind)
    old = yaml.safe_load(config_yaml(config)) | {"train_type": kind}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    assert parse_train_flags(["--config", str(tmp_path / "config.yaml")]) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train_type: stat", "--train_type stat: choose one of .* did you mean state"),
        ("train_parts: ln", "--train_parts takes words"),
        ("ctx_lne: 8", "unknown key 'ctx_lne'; did you mean ctx_len"),
        ("epochs: 8", "unknown key 'epochs'; did you mean epoch_count"),
        ("ctx_len: 8.5", "--ctx_len takes a whole number, not 8.5"),
        ("plan: maybe", "--plan takes 0 or 1"),
        ("- 1", "expected lines such as"),
        ("a: [", "cannot be read as YAML"),
    ],
)
def test_mistakes_in_a_yaml_file_are_named(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse("--config", str(tmp_path / "run.yaml"))
