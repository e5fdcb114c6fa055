"""What common tools call our flags, and what to say of a word that is no flag."""

import difflib
from collections.abc import Iterable

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
