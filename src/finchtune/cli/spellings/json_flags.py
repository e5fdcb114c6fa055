"""Flags that hold several in JSON: --lora_config and its kin of RWKV-PEFT, and --peft_config."""

import difflib
import json
from typing import Any

from finchtune.cli.spellings.parts import parts_of
from finchtune.errors import UserError

SHARDED = ("bone", "bat", "disha")
JSON_FLAGS: dict[str, dict[str, str]] = {
    "bone_config": {"bone_mode": "mode", "bone_load": "peft_load", "bone_r": "r"},
    "disha_config": {"mode": "mode", "load": "peft_load", "r": "r"},
    "miss_config": {"mode": "mode", "load": "peft_load", "r": "r"},
    "lora_config": {
        "lora_load": "peft_load",
        "lora_r": "lora_r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "lora_parts": "parts",
    },
    "pissa_config": {
        "pissa_load": "peft_load",
        "pissa_init": "pissa_init",
        "pissa_r": "pissa_r",
        "svd_niter": "svd_niter",
        "pissa_parts": "parts",
    },
}
"""RWKV-PEFT's JSON spellings: flag -> {its key: our flag}; `mode`, `r` and `parts` are spread."""

FAMILIES = {
    "bone_config": SHARDED,
    "disha_config": SHARDED,
    "miss_config": SHARDED,
    "lora_config": ("lora",),
    "pissa_config": ("pissa",),
}
"""JSON spelling -> the methods that it goes with, the first its default."""

PEFT_CONFIG = "peft_config"
PEFT_KEYS = {
    "lora": {
        "r": "lora_r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
        "use_rslora": "rslora",
    },
    "bone": {"r": "bone_r"},
}
"""--peft_config holds a configuration of Hugging Face's peft: method -> {its key: our flag}."""
PEFT_DEFAULTS = {"lora": {"lora_r": 8, "lora_alpha": 8}, "bone": {"bone_r": 64}}
"""What peft takes for a key that is not there."""


def spread_json(flag: str, text: str, peft: str | None) -> dict[str, Any]:
    """A JSON spelling -> the values of our flags that it stands for.

    `peft` is what the command line says, if anything. Raises UserError.
    """
    content = parse_object(flag, text)
    if flag == PEFT_CONFIG:
        return spread_peft_config(content, peft)
    values = renamed(flag, content, JSON_FLAGS[flag])
    family = FAMILIES[flag]
    if peft is not None and peft not in family:
        raise UserError(f"--{flag} goes with --peft {family[0]}, not --peft {peft}")
    values["peft"] = family[0]
    if family is SHARDED:
        mode = values.pop("mode", "bone")
        if mode not in ("bone", "bat"):
            raise UserError(f"--{flag}: mode is bone or bat, not {mode!r}")
        values["peft"] = mode
        if "r" in values:
            values[f"{mode}_r"] = values.pop("r")
    if "parts" in values:
        values |= {k: v for k, v in parts_of(flag, values.pop("parts")).items() if v}
    return values


def spread_peft_config(content: dict[str, Any], peft: str | None) -> dict[str, Any]:
    """The flags that a configuration of Hugging Face's peft stands for."""
    if peft not in PEFT_KEYS:
        raise UserError(
            f"--{PEFT_CONFIG} goes with --peft {', '.join(PEFT_KEYS)} or miss; for others give "
            "their own flags, as --help lists them"
        )
    values = renamed(PEFT_CONFIG, content, PEFT_KEYS[peft])
    return PEFT_DEFAULTS[peft] | values | {"peft": peft}


def parse_object(flag: str, text: str) -> dict[str, Any]:
    """The JSON object that a flag holds. Raises UserError."""
    try:
        content = json.loads(text)
    except ValueError as error:
        missing = "}--" in text
        hint = "; a space is missing before the next flag" if missing else ""
        raise UserError(f"--{flag} is not JSON: {error}{hint}") from error
    if not isinstance(content, dict):
        raise UserError(f'--{flag} takes an object such as {{"{flag[:4]}_r": 64}}, not {text!r}')
    return content


def renamed(flag: str, content: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """An object with our names for its keys; one that is not known raises UserError."""
    for key in content:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(keys)}"
            raise UserError(f"--{flag}: unknown key {key!r}; {hint}")
    return {keys[key]: value for key, value in content.items()}
