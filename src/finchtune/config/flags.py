"""Every flag of a training run: a field in one of these groups, its help beside it."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from finchtune.methods import flag_methods, method_files, method_flags

METHODS = ("none", "state", *method_files())
LR, STATE_LR = 2e-5, 1.0
"""Default learning rates: of weights and adapters, and of states."""
QUANT = ("none", "nf4", "fp4", "int8", "fp8", "fp8_compute")
TRAIN_TYPES = ("state", "infctx")
STAGES = {
    "auto": 1,
    "ddp": 1,
    "deepspeed_stage_1": 1,
    "deepspeed_stage_2": 2,
    "deepspeed_stage_3": 3,
    "deepspeed_stage_2_offload": 2,
    "deepspeed_stage_3_offload": 3,
}


def flag(default: Any, text: str, choices: tuple[Any, ...] = (), free: bool = False) -> Any:
    """A field that is a flag. `free`: may change when a run is resumed."""
    metadata = {"help": text, "choices": choices, "free": free}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def as_words(value: Any) -> Any:
    """The value of a flag of several words as a list; earlier runs recorded one word, or none.

    Whatever else was recorded is returned as it is.
    """
    if isinstance(value, str):
        return [] if value == "none" else [value]
    return value


def with_method_flags(cls: type) -> type:
    """Give a class of flags those of the methods, which stand in their files."""
    for name, own in method_flags().items():
        text = f"{', '.join(flag_methods()[name])}: {own.help}"
        cls.__annotations__[name] = own.type
        setattr(cls, name, flag(own.default, text, own.choices))
    return cls


@dataclass
class ModelFlags:
    """The base model."""

    load_model: str = flag("", "base weights, a .pth or any other form", free=True)
    my_testing: str | None = flag(
        None, "model generation, as x060; checked against the weight file"
    )
    n_layer: int | None = flag(None, "checked against the weight file")
    n_embd: int | None = flag(None, "checked against the weight file")
    vocab_size: int | None = flag(None, "checked against the weight file")
    head_size_a: int | None = flag(None, "checked against the weight file")
    dim_att: int | None = flag(None, "checked against the weight file")
    dim_ffn: int | None = flag(None, "checked against the weight file")


@dataclass
@with_method_flags
class MethodFlags:
    """What is trained."""

    peft: str = flag("none", "what is trained; none = every parameter", METHODS)
    target: list[str] = flag([], "linears that get an adapter, such as att ffn.key; default all")
    train_parts: list[str] = flag([], "also train parameters whose name contains one of these")
    quant: str = flag(
        "none",
        "keep adapted layers' frozen weights in few bits, with states alone all large weights; "
        "fp8_compute also multiplies in fp8",
        QUANT,
    )
    peft_load: str = flag("", "start from this adapter file instead of a fresh adapter")
    pissa_init: str = flag("", "PiSSA with --peft_load: a separate file of initial A and B")
    lora_plus_ratio: float = flag(1.0, "LoRA and kin: learning rate of B over that of A (LoRA+)")
    lora_ga_batches: int = flag(8, "LoRA-GA: micro batches whose gradient it starts from")


@dataclass
class DataFlags:
    """The data."""

    data_file: str = flag(
        "", "binidx prefix or .jsonl file; several as a,b or in shares as a:0.7,b:0.3", free=True
    )
    data_type: str = flag("binidx", "what data_file is", ("binidx", "jsonl", "sft"))
    dataload: str = flag(
        "pad",
        "a row is one document (padded, or alone), several, or a window of the stream",
        ("pad", "only", "pack", "get"),
    )
    loss_mask: str = flag("pad", "pad or none = all text, qa = answers only", ("none", "pad", "qa"))
    sft_field: list[str] = flag([], "JSON fields: question answer, or instruction input output")
    template: str = flag(
        "", "metamath, alpaca, chat, rwkv-peft or a file; default metamath, chat for messages"
    )
    speakers: list[str] = flag([], "plain text's who asks/who answers; default the usual pairs")
    on_bad: str = flag("fail", "what to do with a bad record of a text file", ("fail", "skip"))
    data_cache: str = flag("", "folder of tokenised text; default proj_dir/data_cache", free=True)
    tokenizer: str | None = flag(None, "world, bytes or a tokenizer.json; default by vocab size")
    ctx_len: int = flag(512, "tokens in a row")


@dataclass
class ContextFlags:
    """Trained states, and long contexts."""

    train_type: list[str] = flag(
        [],
        "state = the state that documents begin from (also --peft state; alone, or beside an "
        "adapter); infctx = contexts of any length, in chunks; state infctx = both",
        ("none", *TRAIN_TYPES),
    )
    lr_state: float | None = flag(
        None, f"learning rate of states beside an adapter; default {STATE_LR:g}"
    )
    chunk_ctx: int = flag(1024, "infctx: tokens in a chunk")
    bptt: str = flag(
        "exact",
        "infctx: gradients through the whole context, or within chunks",
        ("exact", "truncated"),
    )
    infctx_offload: bool = flag(False, "infctx: keep states between chunks on the host", free=True)
    context_parallel: int = flag(1, "processes that share one context, each a part", free=True)


@dataclass
class HeldOutFlags:
    """Held-out data, and text to watch."""

    val_file: str = flag("", "held-out data, of the same kind as data_file", free=True)
    val_split: float = flag(0.0, "hold out this share of data_file's documents")
    val_every: int = flag(0, "steps between losses on held-out data; 0 = an epoch", free=True)
    early_stop: int = flag(0, "stop after so many of them without a new best; 0 = never", free=True)
    sample_prompt: str = flag("", "text that the model continues during training", free=True)
    sample_every: int = flag(0, "steps between samples; 0 = an epoch", free=True)
    sample_tokens: int = flag(64, "length of a sample", free=True)


@dataclass
class StepFlags:
    """The steps."""

    micro_bsz: int = flag(
        1, "rows per process and micro batch; auto = as many as fit, within --global_bsz", free=True
    )
    global_bsz: int = flag(
        0, "rows per optimizer step over all processes; sets the accumulation", free=True
    )
    accumulate_grad_batches: int = flag(1, "micro batches per optimizer step", free=True)
    epoch_steps: int = flag(0, "optimizer steps in an epoch; 0 = one pass over the data")
    epoch_count: int = flag(1, "epochs to train")
    epoch_begin: int = flag(0, "number of the first saved file")
    epoch_save: int = flag(1, "save rwkv-N.pth every so many epochs", free=True)
    lr_init: float = flag(
        None, f"learning rate after warm-up; default {LR:g}, of states alone {STATE_LR:g}"
    )
    lr_final: float | None = flag(None, "learning rate of the last step; default lr_init")
    lr_schedule: str = flag(
        "cos", "way from lr_init to lr_final", ("cos", "exp", "linear", "constant", "wsd")
    )
    warmup_steps: int = flag(0, "steps over which the learning rate grows from 1 %")
    layerwise_lr: bool = flag(False, "train the decays at twice the learning rate")
    beta1: float = flag(0.9, "Adam's first-moment decay")
    beta2: float = flag(0.99, "Adam's second-moment decay")
    adam_eps: float = flag(1e-8, "Adam's epsilon")
    weight_decay: float = flag(0.0, "decoupled weight decay of weight matrices")
    decay_adapters: bool = flag(False, "apply --weight_decay to adapter matrices too")
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 = no clipping")
    l2wrap: float = flag(0.0, "L2Wrap: pull on each token's largest logit; RWKV-LM's is 1e-4")
    loss_mean: str = flag(
        "tokens",
        "mean over a step's unmasked tokens, or first within each micro batch",
        ("tokens", "micro_batches"),
    )
    max_skips: int = flag(3, "stop after so many steps in a row with NaN or infinity", free=True)
    random_seed: int = flag(42, "fixes initialisation, data order and dropout")


@dataclass
class MachineFlags:
    """The machine."""

    accelerator: str = flag("auto", "auto = a GPU if there is one", ("auto", "gpu", "cpu"), True)
    devices: int = flag(1, "processes on this machine, one per GPU", free=True)
    num_nodes: int = flag(1, "machines; more than one needs torchrun or deepspeed", free=True)
    strategy: str = flag(
        "deepspeed_stage_1",
        "ZeRO stage; offload keeps the optimizer (3: the weights too) in the host's memory",
        tuple(STAGES),
        free=True,
    )
    precision: str | None = flag(
        None, "default bf16 on a GPU, fp32 on a CPU", ("bf16", "fp32", "fp16", "tf32")
    )
    timeout_minutes: float = flag(30, "how long to wait for a process that hangs", free=True)
    grad_cp: int = flag(
        1, "recompute in backward: 0 nothing, 1 whole blocks, 2 their cheap parts only", free=True
    )
    cuda_graphs: bool = flag(
        False, "launch each block as CUDA graphs where shapes stay the same", free=True
    )


@dataclass
class RecordFlags:
    """What is recorded and shown."""

    plan: bool = flag(False, "train nothing; print memory, steps, tokens and disk", free=True)
    proj_dir: str = flag("out", "folder of everything the run writes", free=True)
    save_every: int = flag(0, "steps between resumable checkpoints; 0 = none", free=True)
    keep_last: int = flag(0, "checkpoints to keep, the newest; 0 = all", free=True)
    resume: str = flag("", "auto, or a checkpoint folder, to resume from", free=True)
    data_changed: bool = flag(
        False, "with --resume: continue although the data are no longer the same", free=True
    )
    overwrite: bool = flag(False, "throw away an earlier run in proj_dir", free=True)
    wandb: str = flag("", "Weights & Biases project to log to", free=True)
    tensorboard: bool = flag(False, "log to proj_dir/tensorboard too", free=True)


GROUPS = (
    *(ModelFlags, MethodFlags, DataFlags, ContextFlags, HeldOutFlags),
    *(StepFlags, MachineFlags, RecordFlags),
)
