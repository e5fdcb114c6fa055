"""From a command line, and a YAML file, to a TrainConfig.

argparse finds the flags. Converting, checking and explaining them is our own, so that all
mistakes of a command line are reported together, each with its remedy; argparse and the libraries
on top of it stop at the first.
"""

import argparse
import dataclasses
import difflib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finchtune.cli.options import Parser
from finchtune.cli.spellings import rwkv_peft
from finchtune.cli.spellings.compat import COMPAT, as_rwkv_peft, differences
from finchtune.cli.spellings.json_flags import JSON_FLAGS, PEFT_CONFIG, spread_json
from finchtune.cli.spellings.other_tools import OURS, unknown_flag
from finchtune.cli.values import check_choice, convert, is_list, type_of
from finchtune.config import GROUPS, TrainConfig
from finchtune.config.checks import validate
from finchtune.errors import (
    INTERRUPTED,
    LOST_RANK,
    NOT_FINITE,
    OUT_OF_MEMORY,
    USER_ERROR,
    ConfigurationError,
    UserError,
    with_flags,
)
from finchtune.files import read_yaml
from finchtune.methods import flag_methods

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
METAVARS = {int: "N", float: "X", bool: "0|1"}
HELP_WIDTH = 80
RECORD = "extra/finchtune.json"  # as in weights/pth.py, which needs torch
USAGE = "%(prog)s --load_model FILE --data_file FILE [--FLAG VALUE ...]"
EXIT_STATUSES = (
    f"Exit status: 0 done; {USER_ERROR} a mistake in flags, files or data, or a full disk; "
    f"{NOT_FINITE} too many steps with NaN or infinity; {OUT_OF_MEMORY} out of memory; {LOST_RANK} "
    f"another process died or hangs; {INTERRUPTED} stopped by SIGTERM or SIGINT after saving a "
    "checkpoint (resume with --resume auto); 1 a fault of finchtune itself."
)


class _Formatter(argparse.HelpFormatter):
    """Shows every flag with one value; how many there are is checked with all other mistakes."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26, width=HELP_WIDTH)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if isinstance(action.metavar, str):
            return action.metavar
        return super()._format_args(action, default_metavar)


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
    return parse_command_line(arguments)[0]


def parse_command_line(arguments: list[str] | None = None) -> tuple[TrainConfig, list[str]]:
    """As `parse_train_flags`, and what to tell of spellings that only RWKV-PEFT has."""
    known, unknown = build_parser().parse_known_args(arguments)
    given = {name: words for name, words in vars(known).items() if words is not None}
    mistakes = Mistakes()
    words = [word for i, word in enumerate(unknown) if word.startswith("--") or not i]
    known_flags = [*FIELDS, *rwkv_peft.ONLY_THEIRS]
    mistakes += [unknown_flag(word, known_flags) for word in words]
    theirs = rwkv_peft.ONLY_THEIRS & given.keys() - FIELDS.keys() or given.get("peft") == ["miss"]
    compat = given.pop("compat", None)
    given, notes = rwkv_peft.translate(given, FIELDS, mistakes.collected)
    values = given_values(given, mistakes)
    meant = values
    if compat is not None:
        with mistakes.collected():
            check_choice("compat", " ".join(compat), COMPAT)
            meant = as_rwkv_peft(values)
    config = TrainConfig(**meant)
    if mistakes:  # what follows from words that were not understood is left out
        raise ConfigurationError(*mistakes)
    with mistakes.collected():
        validate(config)
    mistakes += [*unused_flags(config, values), *guessed_alpha(config, values)]
    if mistakes:
        raise ConfigurationError(*mistakes)
    return config, told(config, values, notes, bool(compat)) if theirs or compat else []


def told(config: TrainConfig, values: dict[str, Any], notes: list[str], compat: bool) -> list[str]:
    """What a command line in RWKV-PEFT's spelling does otherwise than there."""
    if compat:
        return ["RWKV-PEFT's meanings and defaults (docs/rwkv-peft.md):", *indented(notes)]
    try:
        lines = [*notes, *differences(config, values)]
    except UserError as error:
        lines = [*notes, f"there: {with_flags(error.line)}"]
    if not lines:
        return []
    head = "otherwise than in RWKV-PEFT (--compat rwkv-peft takes its meanings; docs/rwkv-peft.md):"
    return [head, *indented(lines)]


def indented(lines: list[str]) -> list[str]:
    """The lines of a block."""
    return [f"  {line}" for line in lines]


def given_values(given: dict[str, list[str]], mistakes: Mistakes) -> dict[str, Any]:
    """The values of all flags that were given: in the file of --config, and as words."""
    values: dict[str, Any] = {}
    with mistakes.collected():
        values = read_config_file(single("config", given.pop("config", None)), mistakes)
    json_texts = {
        name: " ".join(given.pop(name)) for name in (*JSON_FLAGS, PEFT_CONFIG) if name in given
    }
    for name, words in given.items():
        if name in FIELDS:
            with mistakes.collected():
                values[name] = convert(FIELDS[name], own_value(name, words))
    for flag, text in json_texts.items():
        with mistakes.collected():
            for name, value in spread_json(
                flag, text, "".join(given.get("peft", [])) or None
            ).items():
                if name in given and name != "peft":
                    raise UserError(f"--{name} is given twice: as a flag and in --{flag}")
                values[name] = convert(FIELDS[name], value)
    return values


def own_value(name: str, words: list[str]) -> Any:
    """The words of one of our flags: as they are for a list, else the only one."""
    if is_list(FIELDS[name]) and (words or not FIELDS[name].metadata["choices"]):
        return words
    if not words and type_of(FIELDS[name]) is bool:  # --plan alone means --plan 1
        return "1"
    return single(name, words)


def single(name: str, words: list[str] | None) -> str | None:
    """The one word of a flag. Raises UserError for none and for several."""
    if words is not None and len(words) != 1:
        what = f"takes one value, not {' '.join(words)!r}" if words else "needs a value"
        raise UserError(f"--{name} {what}")
    return words[0] if words else None


def read_config_file(path: str | None, mistakes: Mistakes) -> dict[str, Any]:
    """The values in a YAML file of flags by name; {} without a file. Raises UserError."""
    if path is None:
        return {}
    try:
        content = read_yaml(path)
    except UserError as error:
        raise UserError(f"--config {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines such as `ctx_len: 512`")
    values = {}
    for name, value in content.items():
        if name not in FIELDS:
            near = difflib.get_close_matches(str(name), FIELDS, n=1)
            ours = OURS.get(str(name)) or (near[0] if near else None)
            hint = f"did you mean {ours}?" if ours else "see --help"
            mistakes.append(f"--config {path}: unknown key {name!r}; {hint}")
        elif value is not None:
            with mistakes.collected():
                values[name] = convert(FIELDS[name], value)
    return values


def build_parser() -> argparse.ArgumentParser:
    """All flags, in groups; values stay words."""
    parser = Parser(
        usage=USAGE,
        description="Fine-tune an RWKV model, or train it from scratch.",
        epilog=EXIT_STATUSES,
        allow_abbrev=False,
        formatter_class=_Formatter,
    )
    add = parser.add_argument
    add(
        "--config",
        nargs="*",
        metavar="FILE",
        help="YAML file of flags by name; the command line wins",
    )
    add(
        "--compat",
        nargs="*",
        metavar="WORD",
        help="take that software's meanings and defaults for the flags that it shares (rwkv-peft)",
    )
    for group in GROUPS:
        section = parser.add_argument_group((group.__doc__ or "").rstrip("."))
        for name in group.__annotations__:
            add_flag(section, FIELDS[name])
    section = parser.add_argument_group("As in RWKV-PEFT")
    for name in (*JSON_FLAGS, PEFT_CONFIG):
        section.add_argument(f"--{name}", nargs="*", metavar="JSON", help="an adapter's flags")
    for name in rwkv_peft.FLAGS:
        if name not in FIELDS:
            parser.add_argument(f"--{name}", nargs="*", help=argparse.SUPPRESS)
    # The deepspeed launcher adds this; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def add_flag(section: argparse._ArgumentGroup, field: dataclasses.Field[Any]) -> None:
    """Add the flag of a field of TrainConfig."""
    choices = ", ".join(field.metadata["choices"])
    default = [] if field.default is dataclasses.MISSING else field.default
    shown = "" if default in (None, "", []) else f" [{default}]"
    text = field.metadata["help"] + (f" ({choices})" if choices else "") + shown
    kind = type_of(field)
    metavar = "WORD ..." if is_list(field) else METAVARS.get(kind, "WORD")
    section.add_argument(
        f"--{field.name}", nargs="*", metavar=metavar, help=text.replace("%", "%%")
    )


def unused_flags(config: TrainConfig, values: dict[str, Any]) -> Iterator[str]:
    """A flag of a method that is not the chosen one would be ignored: say so instead."""
    for name, methods in flag_methods().items():
        if name in values and config.peft not in methods:
            yield f"--{name} goes with --peft {' or '.join(methods)}, not --peft {config.peft}"


def guessed_alpha(config: TrainConfig, values: dict[str, Any]) -> Iterator[str]:
    """Alpha stands in no tensor: to start from a file without a record it must be given."""
    methods = flag_methods()["lora_alpha"]
    if config.peft not in methods or not config.peft_load or "lora_alpha" in values:
        return
    path = Path(config.peft_load)
    if path.suffix == ".pth" and not path.with_suffix(".json").exists() and not has_record(path):
        yield (
            f"--peft_load {config.peft_load} has no record in it, nor a JSON beside it, that tells "
            "alpha; give --lora_alpha as it was in its training"
        )


def has_record(path: Path) -> bool:
    """Whether a .pth says itself what it is; seen without torch. True for what is no such file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.partition("/")[2] == RECORD for name in archive.namelist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return not path.exists()
