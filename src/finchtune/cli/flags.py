"""From a command line, and a YAML file, to a TrainConfig.

argparse finds the flags. Converting, checking and explaining them is our own, so that all
mistakes of a command line are reported together, each with its remedy; argparse and the libraries
on top of it stop at the first.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from finchtune.cli import spellings
from finchtune.cli.values import convert, is_list, type_of
from finchtune.config import GROUPS, TrainConfig
from finchtune.errors import (
    INTERRUPTED,
    LOST_RANK,
    NOT_FINITE,
    OUT_OF_MEMORY,
    USER_ERROR,
    ConfigurationError,
    UserError,
)
from finchtune.methods import flag_methods

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
METAVARS = {int: "N", float: "X", bool: "0|1"}
HELP_WIDTH = 80
USAGE = "%(prog)s --load_model FILE --data_file FILE [--FLAG VALUE ...]"
EXIT_STATUSES = (
    f"Exit status: 0 done; {USER_ERROR} a mistake in flags, files or data, or a full disk; "
    f"{NOT_FINITE} too many steps with NaN or infinity; {OUT_OF_MEMORY} out of memory; {LOST_RANK} "
    f"another process died or hangs; {INTERRUPTED} stopped by SIGTERM or SIGINT after saving a "
    "checkpoint (resume with --resume auto); 1 a fault of finchtune itself."
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


class Mistakes(list[str]):
    """Messages of UserErrors, collected instead of raised."""

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Within, a UserError adds to the list."""
        try:
            yield
        except ConfigurationError as error:
            self.extend(error.mistakes)
        except UserError as error:
            self.append(error.line)


def parse_train_flags(arguments: list[str] | None = None) -> TrainConfig:
    """Command-line arguments -> a validated TrainConfig.

    Raises ConfigurationError with every mistake that was found.
    """
    known, unknown = build_parser().parse_known_args(arguments)
    given = {name: value for name, value in vars(known).items() if value is not None}
    mistakes = Mistakes()
    words = [word for i, word in enumerate(unknown) if word.startswith("--") or not i]
    known_flags = [*FIELDS, *spellings.JSON_FLAGS]
    mistakes += [spellings.unknown_flag(word, known_flags) for word in words]
    for name in spellings.REFUSED:
        message = spellings.refused(name, given.pop(name)) if name in given else None
        mistakes += [message] if message else []
    values = given_values(given, mistakes)
    config = TrainConfig(**values)
    if mistakes:  # what follows from words that were not understood is left out
        raise ConfigurationError(*mistakes)
    with mistakes.collected():
        config.validate()
    mistakes += [*unused_flags(config, values), *guessed_alpha(config, values)]
    if mistakes:
        raise ConfigurationError(*mistakes)
    return config


def given_values(given: dict[str, Any], mistakes: Mistakes) -> dict[str, Any]:
    """The values of all flags that were given: in the file of --config, and as words."""
    values: dict[str, Any] = {}
    with mistakes.collected():
        values = read_config_file(given.pop("config", None), mistakes)
    json_texts = {name: given.pop(name) for name in spellings.JSON_FLAGS if name in given}
    for name, value in given.items():
        if name in FIELDS:
            with mistakes.collected():
                values[name] = convert(FIELDS[name], value)
    for flag, text in json_texts.items():
        with mistakes.collected():
            for name, value in spellings.spread_json(flag, text, given.get("peft")).items():
                if name in given and name != "peft":
                    raise UserError(f"--{name} is given twice: as a flag and in --{flag}")
                values[name] = convert(FIELDS[name], value)
    return values


def read_config_file(path: str | None, mistakes: Mistakes) -> dict[str, Any]:
    """The values in a YAML file of flags by name; {} without a file. Raises UserError."""
    if path is None:
        return {}
    import yaml  # slow to import

    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines such as `ctx_len: 512`")
    values = {}
    for name, value in content.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name), FIELDS, n=1)
            ours = spellings.OURS.get(str(name)) or (near[0] if near else None)
            hint = f"did you mean {ours}?" if ours else "see --help"
            mistakes.append(f"--config {path}: unknown key {name!r}; {hint}")
        elif value is not None:
            with mistakes.collected():
                values[name] = convert(FIELDS[name], value)
    return values


def build_parser() -> argparse.ArgumentParser:
    """All flags, in groups; values stay words."""
    parser = _Parser(
        usage=USAGE,
        description="Fine-tune an RWKV model, or train it from scratch.",
        epilog=EXIT_STATUSES,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(
            prog, max_help_position=26, width=HELP_WIDTH
        ),
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file of flags by name; the command line wins"
    )
    for group in GROUPS:
        section = parser.add_argument_group((group.__doc__ or "").rstrip("."))
        for name in group.__annotations__:
            add_flag(section, FIELDS[name])
    section = parser.add_argument_group("As in RWKV-PEFT")
    for name in spellings.JSON_FLAGS:
        section.add_argument(f"--{name}", metavar="JSON", help="an adapter's flags")
    for name in spellings.REFUSED:
        parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    # The deepspeed launcher adds this; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def add_flag(section: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    """Add the flag of a field of TrainConfig."""
    choices = ", ".join(field.metadata["choices"])
    default = [] if field.default is dataclasses.MISSING else field.default
    shown = "" if default in (None, "", []) else f" [{default}]"
    text = field.metadata["help"] + (f" ({choices})" if choices else "") + shown
    kind = type_of(field)
    options: dict[str, Any] = {"metavar": METAVARS.get(kind, "WORD")}
    if kind is bool:  # --plan alone means --plan 1
        options |= {"nargs": "?", "const": "1"}
    elif is_list(field):
        options["nargs"] = "*"
    section.add_argument(f"--{field.name}", help=text.replace("%", "%%"), **options)


def unused_flags(config: TrainConfig, values: dict[str, Any]) -> Iterator[str]:
    """A flag of a method that is not the chosen one would be ignored: say so instead."""
    for name, methods in flag_methods().items():
        if name in values and config.peft not in methods:
            yield f"--{name} goes with --peft {' or '.join(methods)}, not --peft {config.peft}"


def guessed_alpha(config: TrainConfig, values: dict[str, Any]) -> Iterator[str]:
    """LoRA's alpha stands in no tensor: to start from a file without a record it must be given."""
    if config.peft != "lora" or not config.peft_load or "lora_alpha" in values:
        return
    if not Path(config.peft_load).with_suffix(".json").exists():
        yield (
            f"--peft_load {config.peft_load} has no JSON beside it that tells LoRA's alpha; "
            "give --lora_alpha as it was in its training"
        )
