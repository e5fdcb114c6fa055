"""Convert an adapter file to the form of Hugging Face's peft, or back.

An .pth as --input is written as a folder for peft; a folder that peft saved becomes an .pth with
its JSON. The numbers are copied, not computed: there and back gives the same bits.

    python merge/convert_adapter.py --input rwkv-0.pth --output for_peft
    python merge/convert_adapter.py --input for_peft --base_model base.pth --output rwkv-1.pth
"""

import argparse
from pathlib import Path

from finchtune.cli.options import Parser, check_output
from finchtune.cli.stated import add_stated_flags, stated_of
from finchtune.errors import UserError, printable
from finchtune.weights.adapter_files import FORMAT, adapter_record, read_adapter, save_adapter
from finchtune.weights.base import read_base
from finchtune.weights.hashing import weights_sha256
from finchtune.weights.peft_form import (
    PeftAdapter,
    namings,
    read_peft,
    renamed,
    write_peft,
)
from finchtune.weights.stated import spec_of


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    if Path(given.output).exists():
        raise UserError(f"--output {given.output} exists already; choose another name")
    (from_peft if Path(given.input).is_dir() else to_peft)(given)
    print(printable(f"wrote {given.output}"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="an adapter's .pth, or peft's folder")
    parser.add_argument("--output", required=True, help="the folder, or the .pth, to write")
    parser.add_argument("--base_model", help="with a folder: the .pth that the adapter stands on")
    parser.add_argument(
        "--layer_names",
        choices=("plain", *namings()),
        default="plain",
        help="names of peft's side: as in the .pth, or as in Hugging Face conversions",
    )
    add_stated_flags(parser)
    return parser.parse_args(arguments)


def to_peft(given: argparse.Namespace) -> None:
    tensors, record = read_adapter(given.input, given.lora_init), adapter_record(given.input)
    spec = spec_of(record, tensors, stated_of(given), given.input)
    if not spec:
        raise UserError(f"{given.input} is a fully fine-tuned model, not an adapter")
    adapter, naming = PeftAdapter(tensors, spec), namings().get(given.layer_names)
    write_peft(renamed(adapter, naming.theirs) if naming else adapter, given.output)


def from_peft(given: argparse.Namespace) -> None:
    check_output(given.output, given.base_model)
    if not given.base_model:
        raise UserError("give --base_model, on which the adapter stands; its hash is recorded")
    adapter = read_peft(given.input)
    if naming := namings().get(given.layer_names):
        adapter = renamed(adapter, naming.ours)
    weights = read_base(given.base_model)
    for key in adapter.tensors:
        if f"{key.rpartition('.')[0]}.weight" not in weights:
            raise UserError(
                f"{given.input}: {key} belongs to no layer of {given.base_model}; is it the base, "
                "and --layer_names the right one?"
            )
    base = {"file": Path(given.base_model).name, "sha256": weights_sha256(given.base_model)}
    save_adapter(
        adapter.tensors, {"format": FORMAT, "adapter": adapter.spec, "base": base}, given.output
    )
