"""RWKV-PEFT's flags: what asks for what is done anyway, old spellings, and what cannot be done.

Facts of github.com/JL-er/RWKV-PEFT at 5b8aac9 (April 2025) and of its earlier command lines.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from finchtune.cli.spellings.json_flags import JSON_FLAGS, PEFT_CONFIG, parse_object
from finchtune.cli.spellings.parts import parts_of
from finchtune.errors import UserError

Given = dict[str, list[str]]
"""Flags of a command line without dashes, and the words that follow each."""

IGNORED = {
    # Which kernels compute, and what the screen shows, changes no result.
    *("fla", "op", "fused_kernel", "enable_progress_bar", "ds_bucket_mb", "avg_loss"),
    *("enable_checkpointing", "logger", "log_every_n_steps", "num_sanity_val_steps"),
    *("check_val_every_n_epoch", "replace_sampler_ddp"),
    # These act only with --my_pile_stage, which is looked at by itself.
    *("magic_prime", "my_pile_version", "my_exit", "my_exit_tokens", "my_sample_len"),
}
"""Taken, whatever their value."""

HARMLESS = {
    "pre_ffn": ("0", "a first block without attention is not available"),
    "head_qk": ("0", "headQK is not available"),
    "tiny_att_dim": ("0", "tiny attention is not available"),
    "tiny_att_layer": ("-999", "tiny attention is not available"),
    "my_ffn_shift": ("1", "token shift is part of RWKV"),
    "my_att_shift": ("1", "token shift is part of RWKV"),
    "my_pos_emb": ("0", "there are no position embeddings"),
    "head_size_divisor": ("8", "it is 8 in every released model"),
    "dropout": ("0", "use --lora_dropout, with --peft lora"),
    "weight_decay_final": ("-1", "weight decay is constant; give --weight_decay alone"),
    "load_partial": ("0", "weights are loaded whole; make the file complete first"),
    "my_qa_mask": ("0", "use --loss_mask qa"),
    "my_random_steps": ("0", "rows follow --random_seed; drop it"),
    "my_pile_stage": ("0", "give the run's length as --epoch_steps and --epoch_count"),
    "my_pile_shift": ("-1 0", "it belongs to --my_pile_stage; drop it"),
    "my_pile_edecay": ("0", "it belongs to --my_pile_stage; drop it"),
    "optim": ("none adam adamw", "AdamW is the only optimizer; drop it"),
    "merge": ("0", "merge after training, with merge/merge.py"),
    "sft_split": ("train", "point --data_file at a file of the wanted records (head -n 1000)"),
}
"""Flag -> the values that ask for what is done anyway, and what to do about any other."""

REFUSED = {
    "LISA": "LISA is not available; --peft bone or lora train as few parameters",
    "lisa_r": "LISA is not available; drop it",
    "lisa_k": "LISA is not available; drop it",
    "lisa_config": "LISA is not available; drop it",
}
"""What cannot be done, and what to do instead."""

MAPPED = (
    *("lora", "PISSA", "lora_load", "lora_parts", "state_tune"),
    *("disha_r", "miss_r", "rwkv_version"),
)
ANY = ("data_shuffle", "mask_id")
FLAGS = (*IGNORED, *HARMLESS, *REFUSED, *MAPPED, *ANY)
"""Every flag that only RWKV-PEFT has, beside those in JSON."""
ONLY_THEIRS = {*FLAGS, *JSON_FLAGS, PEFT_CONFIG}

SHUFFLED = "--data_shuffle 0: documents are shuffled all the same, by --random_seed"


def translate(given: Given, known: Any, collected: Callable[[], Any]) -> tuple[Given, list[str]]:
    """RWKV-PEFT's flags -> ours; returns them with notes of what was taken without effect.

    `known` holds our flags: what has become one is left alone. Each UserError is raised within
    `collected()`, so that the rest is looked at all the same.
    """
    rest = {name: words for name, words in given.items() if name in known or name not in FLAGS}
    theirs = {name: words for name, words in given.items() if name not in rest}
    notes: list[str] = []
    for name, words in theirs.items():
        with collected():
            refuse(name, words)
            if name == "data_shuffle" and is_any(words, "0 False false"):
                notes.append(SHUFFLED)
            if name == "mask_id":
                parse_object(name, " ".join(words))
    if rest.get("peft") == ["miss"]:
        rest["peft"] = ["bone"]
    for name in ("disha_r", "miss_r"):
        if name in theirs:
            rest |= {"peft": ["bone"], "bone_r": theirs[name]}
    if "rwkv_version" in theirs:
        rest.setdefault("my_testing", theirs["rwkv_version"])
    with collected():
        map_old_lora(rest, theirs, notes)
    if "state_tune" in theirs:
        rest["train_type"] = [*rest.get("train_type", []), "state"]
    return rest, notes


def refuse(name: str, words: list[str]) -> None:
    """Raise UserError for what cannot be done, with what to do instead."""
    shown = " ".join((f"--{name}", *words))
    if name in REFUSED and words != ["none"]:
        raise UserError(f"{shown} cannot be honoured: {REFUSED[name]}")
    if name in HARMLESS and not is_any(words, HARMLESS[name][0]):
        raise UserError(f"{shown} cannot be honoured: {HARMLESS[name][1]}")


def is_any(words: list[str], values: str) -> bool:
    """Whether the words are one of these values, as text or as numbers."""
    word = " ".join(words)
    return any(word == value or number(word) == number(value) for value in values.split())


def number(word: str) -> float | str:
    """A word's number, or itself where it is none."""
    try:
        return float(word)
    except ValueError:
        return word


def map_old_lora(rest: Given, theirs: Given, notes: list[str]) -> None:
    """The spelling of 2024: --lora, with --PISSA for that, and their flags."""
    named = {"pissa"} if "PISSA" in theirs else {"lora"} if "lora" in theirs else set()
    for method in named:
        if rest.get("peft", [method]) != [method]:
            flag = "PISSA" if method == "pissa" else "lora"
            raise UserError(
                f"--{flag} means --peft {method}, but --peft {rest['peft'][0]} is given"
            )
        rest["peft"] = [method]
    if named == {"pissa"}:
        if "lora_r" in rest:
            rest["pissa_r"] = rest.pop("lora_r")
        dropped = [name for name in ("lora_alpha", "lora_dropout") if rest.pop(name, None)]
        if dropped:
            notes.append(f"--{' --'.join(dropped)}: PiSSA has none, there as here")
    if "lora_load" in theirs:
        path = " ".join(theirs["lora_load"])
        if path and Path(path).is_file():
            rest["peft_load"] = [path]
        elif path:
            notes.append(f"--lora_load {path}: no such file; a fresh adapter, as there")
    if "lora_parts" in theirs:
        for flag, values in parts_of("lora_parts", ",".join(theirs["lora_parts"])).items():
            if values or flag == "train_parts":
                rest[flag] = [*rest.get(flag, []), *values]
