"""From a command line to a TrainConfig: our flags, and those of RWKV-PEFT's scripts."""

import argparse
import dataclasses
import difflib
import json
import types
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from finchtune.config import METHOD_FLAGS, TrainConfig
from finchtune.errors import (
    INTERRUPTED,
    LOST_RANK,
    NOT_FINITE,
    OUT_OF_MEMORY,
    USER_ERROR,
    UserError,
)

# RWKV-PEFT's flags that cannot be honoured (yet), and what to do instead.
REFUSED = {
    "sft_split": "only train is there; point --data_file at a file of the wanted records",
    "data_shuffle": "documents are always shuffled, by --random_seed; drop the flag",
    "train_type": "state tuning and infinite context are not available; drop the flag",
    "chunk_ctx": "infinite context is not available; raise --ctx_len instead",
    "fla": "the kernels built into finchtune are always used; drop the flag",
    "op": "the kernels built into finchtune are always used; drop the flag",
    "merge": "merge after training, with merge/merge.py",
    "peft_config": "use --bone_config, --disha_config, --lora_config or --pissa_config",
}
# Values of these that ask for what is done anyway.
HONOURED = {"sft_split": ("train",), "data_shuffle": ("1", "True", "true")}

# JSON spellings: flag -> {its key: our field}. None: must be empty.
JSON_FLAGS: dict[str, dict[str, str]] = {
    "bone_config": {"bone_mode": "mode", "bone_load": "peft_load", "bone_r": "r"},
    "disha_config": {"mode": "mode", "load": "peft_load", "r": "r"},
    "lora_config": {
        "lora_load": "peft_load",
        "lora_r": "lora_r",
        "lora_alpha": "lora_alpha",
        "lora_dropout": "lora_dropout",
    },
    "pissa_config": {
        "pissa_load": "peft_load",
        "pissa_init": "pissa_init",
        "pissa_r": "pissa_r",
        "svd_niter": "svd_niter",
    },
}
EXIT_STATUSES = (
    f"Exit status: 0 done; {USER_ERROR} a mistake in flags, files or data, or a full disk; "
    f"{NOT_FINITE} too many steps with NaN or infinity; {OUT_OF_MEMORY} out of memory; {LOST_RANK} "
    f"another process died or hangs; {INTERRUPTED} stopped by SIGTERM or SIGINT after saving a "
    "checkpoint (go on with --resume auto); 1 a fault of finchtune itself."
)
LIST_HINT = "words, or a JSON list"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_train_flags(arguments: list[str] | None = None) -> TrainConfig:
    """Command-line arguments -> a validated TrainConfig. Raises UserError."""
    parser, fields = _build_parser()
    known, unknown = parser.parse_known_args(arguments)
    given = {name: value for name, value in vars(known).items() if value is not None}
    given.pop("local_rank", None)
    for word in unknown:
        _refuse_unknown(word, [*fields, *JSON_FLAGS])
    json_values = {name: given.pop(name) for name in JSON_FLAGS if name in given}
    values = {name: _convert(fields[name], value) for name, value in given.items()}
    for name, text in json_values.items():
        _apply_json(name, text, values, fields)
    config = TrainConfig(**values)
    config.validate()
    _refuse_unused(config, values)
    _refuse_guessed_alpha(config, values)
    return config


def _build_parser() -> tuple[argparse.ArgumentParser, dict[str, dataclasses.Field]]:
    parser = _Parser(
        prog="train.py",
        description="Fine-tune an RWKV-6 model.",
        epilog=EXIT_STATUSES,
        allow_abbrev=False,
    )
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    for name, field in fields.items():
        choices = "|".join(field.metadata["choices"])
        default = field.default if field.default is not dataclasses.MISSING else []
        shown = "" if default in (None, "", []) else f" [{default}]"
        text = field.metadata["help"] + (f" ({choices})" if choices else "") + shown
        if field.type is bool:  # --plan alone means --plan 1
            parser.add_argument(f"--{name}", nargs="?", const="1", help=text)
            continue
        many = "*" if _is_list(field) else None
        parser.add_argument(f"--{name}", nargs=many, help=text.replace("%", "%%"))
    for name in JSON_FLAGS:
        parser.add_argument(f"--{name}", help="JSON spelling of an adapter's flags")
    for name, remedy in REFUSED.items():
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS, action=_Refuse,
                            const=remedy)  # fmt: skip
    # The deepspeed launcher adds this; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser, fields


class _Refuse(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        if " ".join(values) not in HONOURED.get(self.option_strings[0][2:], ()):
            raise UserError(f"{option_string} cannot be honoured: {self.const}")


def _refuse_unknown(word: str, known: list[str]) -> NoReturn:
    if not word.startswith("--"):
        raise UserError(f"stray argument {word!r}; flags start with --")
    name = word[2:].split("=")[0]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean --{near[0]}?" if near else "see python train.py --help"
    raise UserError(f"unknown flag --{name}; {hint}")


def _is_list(field: dataclasses.Field) -> bool:
    return get_origin(field.type) is list


def _convert(field: dataclasses.Field, value: Any) -> Any:
    """A word (or words) from the command line -> the field's type."""
    name, choices = field.name, field.metadata["choices"]
    if name == "my_testing":
        from finchtune.models import generations  # needs torch, which --help does not

        choices = tuple(generations())
    if name == "micro_bsz" and value == "auto":
        return 0  # settled when the device is known
    if _is_list(field):
        return _convert_list(name, value)
    kind: Any = field.type
    if isinstance(kind, types.UnionType):
        kind = next(option for option in get_args(kind) if option is not type(None))
    if kind is bool:
        if str(value).lower() not in ("0", "1", "true", "false"):
            raise UserError(f"--{name} takes 0 or 1, not {value!r}")
        return str(value).lower() in ("1", "true")
    try:
        converted = kind(value)
    except ValueError as error:
        what = {int: "a whole number", float: "a number"}[kind]
        raise UserError(f"--{name} takes {what}, not {value!r}") from error
    if name == "micro_bsz" and converted == 0:
        raise UserError("--micro_bsz must be at least 1, or auto, not 0")
    if choices and converted not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        if (name, value) == ("quant", "4bit"):
            hint = "; nf4 is the 4-bit form"
        raise UserError(f"--{name} {value}: choose one of {', '.join(choices)}{hint}")
    return converted


def _convert_list(name: str, words: list[str]) -> list[str]:
    """`a b`, `["a", "b"]` and `[]` -> a list of strings."""
    text = " ".join(words)
    if not text.startswith("["):
        return words
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        raise UserError(f'--{name} takes {LIST_HINT} such as ["time", "ln"], not {text!r}')
    return found


def _apply_json(flag: str, text: str, values: dict, fields: dict) -> None:
    """Spread a JSON spelling over the fields it stands for, in `values`."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"--{flag} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f'--{flag} takes an object such as {{"{flag[:4]}_r": 64}}, not {text!r}')
    keys = JSON_FLAGS[flag]
    for key in content:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(keys)}"
            raise UserError(f"--{flag}: unknown key {key!r}; {hint}")
    spread = {keys[key]: value for key, value in content.items()}
    family = {"bone_config": ("bone", "bat", "disha"), "disha_config": ("disha", "bone", "bat"),
              "lora_config": ("lora",), "pissa_config": ("pissa",)}[flag]  # fmt: skip
    if values.get("peft", family[0]) not in family:
        raise UserError(f"--{flag} goes with --peft {family[0]}, not --peft {values['peft']}")
    values["peft"] = family[0]
    if "bone" in family:
        mode = spread.pop("mode", "bone")
        if mode not in ("bone", "bat"):
            raise UserError(f"--{flag}: mode is bone or bat, not {mode!r}")
        values["peft"] = mode
        if "r" in spread:
            spread[f"{mode}_r"] = spread.pop("r")
    for name, value in spread.items():
        if name in values:
            raise UserError(f"--{name} is given twice: as a flag and in --{flag}")
        values[name] = _convert(fields[name], value)


def _refuse_unused(config: TrainConfig, values: dict) -> None:
    """A flag of a method that is not the chosen one would be ignored: say so instead."""
    for name, methods in METHOD_FLAGS.items():
        if name in values and config.peft not in methods:
            choice = " or ".join(methods)
            raise UserError(f"--{name} goes with --peft {choice}, not --peft {config.peft}")
    if config.data_type == "binidx" and config.sft_field:
        raise UserError("--sft_field goes with --data_type jsonl; binidx files carry their masks")


def _refuse_guessed_alpha(config: TrainConfig, values: dict) -> None:
    """LoRA's alpha stands in no tensor: to go on from a file without a JSON it must be given."""
    if config.peft != "lora" or not config.peft_load or "lora_alpha" in values:
        return
    if not Path(config.peft_load).with_suffix(".json").exists():
        raise UserError(
            f"--peft_load {config.peft_load} has no JSON beside it that tells LoRA's alpha; "
            "give --lora_alpha as it was in its training"
        )
