"""Write a model, or an adapter, in the form that another runtime loads.

    finchtune export --model base.pth --to gguf --output model.gguf --dtype q8_0
    finchtune export --model base.pth --peft_checkpoint rwkv-0.pth --to web-rwkv --output tuned.st
    finchtune export --model base.pth --peft_checkpoint rwkv-0.pth --adapter_only 1 \\
        --to gguf --output adapter.gguf

With --peft_checkpoint the adapter is merged on the way, or written by itself with --adapter_only 1,
as trained initial states are.
docs/deploying.md tells what each runtime needs.
"""

import argparse
from pathlib import Path
from typing import Any

from finchtune.cli.options import OTHER_BASE, Parser, check_output
from finchtune.cli.stated import add_stated_flags, stated_of
from finchtune.data import templates
from finchtune.errors import UserError, printable
from finchtune.tokenizer import Tokenizer, load_tokenizer
from finchtune.weights.base import model_sizes, read_base
from finchtune.weights.exporting import (
    chosen_dtype,
    export_adapter,
    export_model,
    export_states,
    receipt_path,
)
from finchtune.weights.forms import FORMS, Form, Settings, get_form
from finchtune.weights.peft_form import namings
from finchtune.weights.state_files import holds_states, tensors_in


def main(arguments: list[str] | None = None) -> None:
    given = parse(arguments)
    form = get_form(given.to)
    states = bool(given.adapter_only and given.peft_checkpoint) and holds_states(
        given.peft_checkpoint
    )
    check(given, form, states)
    settings = settings_of(given, form, states)
    options: dict[str, Any] = {"stated": stated_of(given), "other_base": bool(given.other_base)}
    if given.adapter_only and given.lora_init:
        raise UserError("--lora_init goes with a merged export; merge first, or --adapter_only 0")
    if states:
        options.pop("stated")
        export_states(given.model, given.peft_checkpoint, given.output, form, settings, **options)
    elif given.adapter_only:
        receipt = export_adapter(
            given.model, given.peft_checkpoint, given.output, form, settings, **options
        )
        print(f"told to a runtime as alpha: {receipt['alpha']:g}")
    else:
        options |= {"initial": given.lora_init}
        export_model(given.model, given.output, form, settings, given.peft_checkpoint, **options)
    if form.name == "gguf":
        print(printable(f"for Ollama: ollama create NAME -f {given.output}.Modelfile"))
    print(printable(f"{given.output}: {form.title}; receipt: {receipt_path(given.output)}"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = sorted({dtype for form in FORMS.values() for dtype in form.dtypes})
    parser.add_argument("--model", required=True, help="weights in any form that is known")
    parser.add_argument("--peft_checkpoint", help="an adapter that was trained on them")
    parser.add_argument("--adapter_only", type=int, choices=(0, 1), default=0,
                        help="write the adapter, or trained states, by itself")  # fmt: skip
    parser.add_argument("--to", required=True, help=", ".join(writable()))
    parser.add_argument("--output", required=True, help="the file or folder to write")
    parser.add_argument("--dtype", help=f"{', '.join(kinds)}; as they are, if the form has it")
    parser.add_argument("--tokenizer", help="world, bytes or a tokenizer.json")
    parser.add_argument("--template", default="chat",
                        help=f"{', '.join(templates.TEMPLATES)}, or a file [chat]")  # fmt: skip
    parser.add_argument("--layer_names", choices=("plain", *namings()), default="plain",
                        help="for peft: as in the .pth, or as in Hugging Face folders")  # fmt: skip
    parser.add_argument("--other_base", type=int, choices=(0, 1), default=0, help=OTHER_BASE)
    add_stated_flags(parser)
    return parser.parse_args(arguments)


def writable() -> list[str]:
    """The forms that something can be written in."""
    return [form.name for form in FORMS.values() if form.write or form.write_adapter]


def check(given: argparse.Namespace, form: Form, states: bool) -> None:
    """Raise UserError for what cannot be asked for."""
    if given.adapter_only and not given.peft_checkpoint:
        raise UserError("--adapter_only 1 needs --peft_checkpoint, the adapter to write")
    if states and form.write_states is None:
        names = ", ".join(one.name for one in FORMS.values() if one.write_states)
        raise UserError(f"--to {form.name} has no initial states by themselves; {names} have")
    if given.adapter_only and not states and form.write_adapter is None:
        names = ", ".join(one.name for one in FORMS.values() if one.write_adapter)
        raise UserError(f"--to {form.name} has no adapters by themselves; {names} have")
    if not given.adapter_only and form.write is None:
        hint = "holds adapters: give --adapter_only 1" if form.write_adapter else "is only read"
        raise UserError(f"--to {form.name}: {form.title} {hint}")
    if form.suffix:
        inputs = (given.model, given.peft_checkpoint, given.lora_init)
        check_output(given.output, *inputs, suffixes=(form.suffix,))
    elif Path(given.output).exists():
        raise UserError(f"--output {given.output} exists already; choose another name")


def settings_of(given: argparse.Namespace, form: Form, states: bool) -> Settings:
    """What the flags say of the form, with the tokenizer and the template that go into it."""
    like = tensors_in(given.peft_checkpoint) if states else read_base(given.model)
    dtype = chosen_dtype(form, given.dtype, like)
    vocab_size = model_sizes(given.model).vocab_size
    tokenizer: Tokenizer | None = None
    if given.tokenizer or form.name in ("gguf", "hf", "fla"):
        tokenizer = load_tokenizer(given.tokenizer, vocab_size)
    return Settings(
        dtype=dtype,
        name=Path(given.output).stem,
        tokenizer=tokenizer,
        template=templates.get(given.template),
        layer_names=given.layer_names,
    )
