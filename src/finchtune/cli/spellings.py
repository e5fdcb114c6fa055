"""Flags as other software spells them: what is understood, and what to do about the rest."""

import difflib
import json
from collections.abc import Iterable
from typing import Any

from finchtune.errors import UserError

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
"""RWKV-PEFT's flags that cannot be honoured, and what to do instead."""

HONOURED = {"sft_split": ("train",), "data_shuffle": ("1", "True", "true")}
"""Values of these that ask for what is done anyway."""

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
"""RWKV-PEFT's JSON spellings: flag -> {its key: our flag}."""

FAMILIES = {
    "bone_config": ("bone", "bat", "disha"),
    "disha_config": ("disha", "bone", "bat"),
    "lora_config": ("lora",),
    "pissa_config": ("pissa",),
}
"""JSON spelling -> the methods that it goes with, the first its default."""

ELSEWHERE = {
    "load_model": ("model", "model_name", "model_name_or_path", "base_model", "model_path"),
    "data_file": ("dataset", "data", "data_path", "train_file", "dataset_path", "dataset_name"),
    "val_file": ("eval_file", "validation_file", "eval_data"),
    "proj_dir": ("output_dir", "output", "out_dir", "save_dir"),
    "micro_bsz": ("batch_size", "per_device_train_batch_size", "train_batch_size", "bsz"),
    "global_bsz": ("global_batch_size", "total_batch_size"),
    "accumulate_grad_batches": ("gradient_accumulation_steps", "grad_accum", "grad_acc"),
    "epoch_count": ("epochs", "num_epochs", "num_train_epochs", "max_epochs"),
    "epoch_steps": ("max_steps", "steps", "num_steps"),
    "lr_init": ("lr", "learning_rate"),
    "lr_schedule": ("lr_scheduler_type", "lr_scheduler", "scheduler"),
    "warmup_steps": ("num_warmup_steps",),
    "ctx_len": (
        "max_seq_length",
        "max_seq_len",
        "seq_len",
        "max_length",
        "block_size",
        "cutoff_len",
    ),
    "peft": ("method", "adapter", "peft_type"),
    "random_seed": ("seed",),
    "grad_clip": ("max_grad_norm", "gradient_clip_val"),
    "grad_cp": ("gradient_checkpointing",),
    "precision": ("dtype", "bf16", "fp16", "torch_dtype"),
    "save_every": ("save_steps",),
    "keep_last": ("save_total_limit",),
    "resume": ("resume_from_checkpoint",),
    "devices": ("num_gpus", "gpus", "nproc_per_node"),
    "wandb": ("wandb_project", "report_to"),
}
"""Our flag -> what common tools call it."""
OURS = {theirs: ours for ours, names in ELSEWHERE.items() for theirs in names}


def unknown_flag(word: str, known: Iterable[str]) -> str:
    """What to say of a word of the command line that is no flag."""
    if not word.startswith("--"):
        return f"stray argument {word!r}; flags start with --"
    name = word[2:].split("=")[0]
    if name.replace("-", "_") in OURS:
        return f"unknown flag --{name}; here it is --{OURS[name.replace('-', '_')]}"
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean --{near[0]}?" if near else "see --help"
    return f"unknown flag --{name}; {hint}"


def refused(name: str, words: list[str]) -> str | None:
    """Why a flag of REFUSED with these words cannot be honoured; None if it can."""
    if " ".join(words) in HONOURED.get(name, ()):
        return None
    return f"--{name} cannot be honoured: {REFUSED[name]}"


def spread_json(flag: str, text: str, peft: str | None) -> dict[str, Any]:
    """A JSON spelling -> the values of our flags that it stands for.

    `peft` is what the command line says, if anything. Raises UserError.
    """
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
    values = {keys[key]: value for key, value in content.items()}
    family = FAMILIES[flag]
    if peft is not None and peft not in family:
        raise UserError(f"--{flag} goes with --peft {family[0]}, not --peft {peft}")
    values["peft"] = family[0]
    if "bone" in family:
        mode = values.pop("mode", "bone")
        if mode not in ("bone", "bat"):
            raise UserError(f"--{flag}: mode is bone or bat, not {mode!r}")
        values["peft"] = mode
        if "r" in values:
            values[f"{mode}_r"] = values.pop("r")
    return values
