"""What the commands that write text share: flags and the model."""

import argparse
import dataclasses

import torch

from finchtune.cli.stated import add_stated_flags, stated_of
from finchtune.data import templates
from finchtune.data.templates import Template
from finchtune.errors import UserError
from finchtune.inference.sampling import Sampling
from finchtune.models import LanguageModel
from finchtune.tokenizer import Tokenizer, load_tokenizer
from finchtune.weights.adapter_files import adapter_record
from finchtune.weights.state_files import set_states
from finchtune.weights.writing import writing_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOST = 1_000_000  # tokens to write, texts at once, questions


def add_model_flags(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--model", required=required, help="weights, a plain .pth")
    parser.add_argument("--state", metavar="FILE", help="trained states to begin texts from")
    add_stated_flags(parser)
    parser.add_argument("--tokenizer", help="world, bytes or a tokenizer.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="fp32 on a CPU, else the file's own, if not given"
    )


def add_adapter_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peft_checkpoint", help="an adapter's .pth, which stays unmerged")


def add_sampling_flags(parser: argparse.ArgumentParser, temperature: float, top_p: float) -> None:
    parser.add_argument(
        "--temperature", type=float, default=temperature, help="0 = always the likeliest"
    )
    parser.add_argument("--top_p", type=float, default=top_p)
    parser.add_argument("--top_k", type=int, default=0, help="0 = all")
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--presence_penalty", type=float, default=0.0)
    parser.add_argument("--frequency_penalty", type=float, default=0.0)
    parser.add_argument(
        "--penalty_decay", type=float, default=1.0, help="of the counts, at every token"
    )
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")


def sampling_of(given: argparse.Namespace) -> Sampling:
    """The settings that flags ask for; UserError for one out of its limits."""
    fields = dataclasses.fields(Sampling)
    return Sampling(**{field.name: getattr(given, field.name) for field in fields})


def template_of(given: argparse.Namespace, default: str = "chat") -> Template:
    """The template that flags ask for, else the default."""
    return chosen_template(given) or templates.get(default)


def chosen_template(given: argparse.Namespace) -> Template | None:
    """The template that --template names, else the one that the adapter's record holds, if any."""
    if given.template:
        return templates.get(given.template)
    record = adapter_record(given.peft_checkpoint) if given.peft_checkpoint else None
    if record and record.get("template"):
        return templates.from_record(record["template"], f"{given.peft_checkpoint}: template")
    return None


def check_counts(**flags: int | None) -> None:
    """Raise UserError for a flag below 1, or beyond what anyone would wait for."""
    for name, value in flags.items():
        if value is not None and not 1 <= value <= MOST:
            raise UserError(f"--{name} must be at least 1 and at most {MOST:,}, not {value}")


def open_model(given: argparse.Namespace) -> tuple[LanguageModel, Tokenizer]:
    """The model and tokenizer that flags ask for."""
    try:
        device = torch.device(given.device)
    except RuntimeError as error:
        raise UserError(f"--device {given.device}: give cpu, cuda or cuda:N") from error
    model = writing_model(
        given.model,
        given.peft_checkpoint,
        DTYPES.get(given.dtype),
        device,
        stated_of(given),
        given.lora_init,
    )
    if given.state:
        set_states(model, given.state)
    return model, load_tokenizer(given.tokenizer, model.config.vocab_size)
