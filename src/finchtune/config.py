"""The configuration of a training run: a field for each flag, and what makes a run impossible."""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from finchtune.errors import ConfigurationError
from finchtune.methods import flag_methods, method_files, method_flags

METHODS = ("none", "state", *method_files())
LR, STATE_LR = 2e-5, 0.1
"""Default learning rates: of weights and adapters, and of states."""
DESTRUCTIVE_LR = 0.05  # of all weights
QUANT = ("none", "nf4", "fp4", "int8", "fp8")
STAGES = {
    "auto": 1,
    "ddp": 1,
    "deepspeed_stage_1": 1,
    "deepspeed_stage_2": 2,
    "deepspeed_stage_3": 3,
    "deepspeed_stage_2_offload": 2,
    "deepspeed_stage_3_offload": 3,
}
AT_LEAST_ONE = {
    *("chunk_ctx", "context_parallel"),
    *("ctx_len", "accumulate_grad_batches", "lora_ga_batches"),
    *("epoch_count", "epoch_save", "devices", "num_nodes", "sample_tokens", "max_skips"),
    *("n_layer", "n_embd", "vocab_size", "head_size_a", "dim_att", "dim_ffn"),
    *(name for name, flag in method_flags().items() if flag.at_least_one),
}
AT_MOST = {
    **dict.fromkeys(("devices", "num_nodes"), 1024),
    **dict.fromkeys(("lr_init", "lr_final", "lr_state"), 100),
    **dict.fromkeys(("adam_eps", "weight_decay", "l2wrap"), 1),
    "timeout_minutes": 10**6,
    "random_seed": 2**63 - 1,
}
MOST = 10**9
"""What a number may be at most, where AT_MOST has no other bound."""
BELOW_ONE = {"beta1", "beta2", "lora_dropout", "val_split"}
ABOVE_ZERO = {
    "lr_init",
    "lr_state",
    "lora_alpha",
    "lora_plus_ratio",
    "lora_ga_gamma",
    "timeout_minutes",
}


def flag(default: Any, text: str, choices: tuple[Any, ...] = (), free: bool = False) -> Any:
    """A field that is a flag. `free`: may change when a run is resumed."""
    metadata = {"help": text, "choices": choices, "free": free}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


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

    load_model: str = flag("", "base weights, an RWKV-6 .pth file", free=True)
    my_testing: str | None = flag(None, "model generation, x060; checked against the weight file")
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
    train_parts: list[str] = flag([], "also train parameters whose name contains one of these")
    quant: str = flag("none", "keep the adapted layers' frozen weights in few bits", QUANT)
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

    train_type: str = flag(
        "none",
        "state = the state that documents begin from (also --peft state; alone, or beside an "
        "adapter); infctx = contexts of any length, in chunks",
        ("none", "state", "infctx"),
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
    layerwise_lr: bool = flag(False, "train time_decay at twice the learning rate")
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


@dataclass
class RecordFlags:
    """What is recorded and shown."""

    plan: bool = flag(False, "train nothing; print memory, steps, tokens and disk", free=True)
    proj_dir: str = flag("out", "folder of everything the run writes", free=True)
    save_every: int = flag(0, "steps between resumable checkpoints; 0 = none", free=True)
    keep_last: int = flag(0, "checkpoints to keep, the newest; 0 = all", free=True)
    resume: str = flag("", "auto, or a checkpoint folder, to go on from", free=True)
    data_changed: bool = flag(
        False, "with --resume: go on although the data are no longer the same", free=True
    )
    overwrite: bool = flag(False, "throw away an earlier run in proj_dir", free=True)
    wandb: str = flag("", "Weights & Biases project to log to", free=True)
    tensorboard: bool = flag(False, "log to proj_dir/tensorboard too", free=True)


GROUPS = (
    *(ModelFlags, MethodFlags, DataFlags, ContextFlags, HeldOutFlags),
    *(StepFlags, MachineFlags, RecordFlags),
)


@dataclass
class TrainConfig(
    RecordFlags,
    MachineFlags,
    StepFlags,
    HeldOutFlags,
    ContextFlags,
    DataFlags,
    MethodFlags,
    ModelFlags,
):
    """What one training run does. Field names are flag names."""

    def __post_init__(self) -> None:
        if self.lr_init is None:
            self.lr_init = STATE_LR if self.trains_state and self.adapter == "none" else LR

    @property
    def adapter(self) -> str:
        """The adapter's method, none if there is no adapter."""
        return "none" if self.peft == "state" else self.peft

    @property
    def trains_state(self) -> bool:
        """Whether the state that documents begin from is trained."""
        return "state" in (self.peft, self.train_type)

    @property
    def trains_all(self) -> bool:
        """Whether every parameter is trained."""
        return self.adapter == "none" and not self.trains_state

    @property
    def state_lr(self) -> float:
        """Learning rate of trained states."""
        return self.lr_init if self.adapter == "none" else self.lr_state or STATE_LR

    @property
    def chunked(self) -> bool:
        """Whether contexts are read in chunks."""
        return self.train_type == "infctx"

    def readers(self, world: int) -> int:
        """How many of `world` processes, or groups that share contexts, read rows of their own."""
        return world // self.context_parallel

    @property
    def stage(self) -> int:
        return STAGES[self.strategy]

    @property
    def accumulates(self) -> bool:
        """Whether gradients of several backwards are summed in a step."""
        return self.accumulate_grad_batches > 1 or self.chunked

    @property
    def offload(self) -> bool:
        return self.strategy.endswith("_offload")

    @property
    def adapter_hyperparameters(self) -> dict[str, Any]:
        """Keyword arguments for `attach(model, self.peft, ...)`."""
        own = {
            flag.hyperparameter: getattr(self, name)
            for name, flag in method_flags().items()
            if self.peft in flag.methods
        }
        return own if self.quant == "none" else own | {"quant": self.quant}

    def validate(self) -> None:
        """Raise ConfigurationError for all values, and pairs of values, that make no sense."""
        mistakes = [*self._missing(), *self._out_of_range(), *self._contradictions()]
        if mistakes:
            raise ConfigurationError(*mistakes)

    def _missing(self) -> Iterator[str]:
        for name in ("load_model",) if self.plan else ("load_model", "data_file"):
            if not getattr(self, name):
                yield f"--{name} is missing"
        for package in ("wandb", "tensorboard"):
            if getattr(self, package) and find_spec(package) is None:
                yield f"--{package} needs the package: pip install {package}"

    def _out_of_range(self) -> Iterator[str]:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = 1 if name in AT_LEAST_ONE else 0
            if not math.isfinite(value):
                yield f"--{name} must be a finite number, not {value}"
            elif value < least:
                yield f"--{name} must be {'at least 1' if least else 'zero or more'}, not {value}"
            elif value > (most := AT_MOST.get(name, MOST)):
                yield f"--{name} must be at most {most:,}, not {value:,}"
            elif name in BELOW_ONE and value >= 1:
                yield f"--{name} must be below 1, not {value}"
            elif name in ABOVE_ZERO and value == 0:
                yield f"--{name} must be above zero"
        if self.grad_cp not in (0, 1, 2):
            yield f"--grad_cp must be 0, 1 or 2, not {self.grad_cp}"

    def _contradictions(self) -> Iterator[str]:
        yield from self._contradictions_of_method()
        yield from self._contradictions_of_contexts()
        if self.lr_schedule == "exp" and self.lr_final == 0:
            yield "--lr_schedule exp cannot reach --lr_final 0; give a small number"
        if self.lr_schedule == "constant" and self.lr_final not in (None, self.lr_init):
            yield "--lr_schedule constant has no use for --lr_final; drop it or use cos"
        if self.micro_bsz == 0 and not self.global_bsz:
            yield "--micro_bsz auto needs --global_bsz, the rows of an optimizer step"
        if self.global_bsz and self.accumulate_grad_batches != 1:
            yield "--global_bsz sets the accumulation; drop --accumulate_grad_batches"
        held_out = [name for name in ("val_file", "val_split") if getattr(self, name)]
        if len(held_out) == 2:
            yield "--val_file and --val_split both name held-out data; choose one"
        for name in ("val_every", "early_stop"):
            if getattr(self, name) and not held_out:
                yield f"--{name} needs held-out data: give --val_file or --val_split"
        if self.sample_every and not self.sample_prompt:
            yield "--sample_every needs a --sample_prompt"
        if self.data_type == "binidx" and self.sft_field:
            yield "--sft_field goes with --data_type jsonl; binidx files carry their masks"

    def _contradictions_of_method(self) -> Iterator[str]:
        if self.pissa_init and not (self.peft == "pissa" and self.peft_load):
            yield "--pissa_init goes with --peft pissa and --peft_load"
        if self.trains_all and (self.train_parts or self.peft_load):
            yield "--train_parts and --peft_load need --peft; without it all is trained"
        if self.adapter == "none" and self.quant != "none":
            yield "--quant needs --peft: a quantised weight cannot be trained itself"
        if self.decay_adapters and not (self.weight_decay and self.adapter != "none"):
            yield "--decay_adapters goes with --weight_decay and --peft"
        if self.weight_decay and not self.trains_all and not self.decay_adapters:
            yield (
                f"--weight_decay {self.weight_decay:g} would act on nothing: adapter matrices are "
                "not decayed unless --decay_adapters 1 is given"
            )

    def _contradictions_of_contexts(self) -> Iterator[str]:
        if self.trains_all and self.lr_init >= DESTRUCTIVE_LR:
            yield (
                f"--lr_init {self.lr_init:g} would destroy a model whose every weight is trained; "
                "give --train_type state if it is for states, else a lower rate"
            )
        if self.lr_state and not (self.trains_state and self.adapter != "none"):
            yield "--lr_state goes with --train_type state and an adapter; else give --lr_init"
        changed = [
            *(["chunk_ctx"] if self.chunk_ctx != ContextFlags.chunk_ctx else []),
            *(["bptt"] if self.bptt != ContextFlags.bptt else []),
            *(["infctx_offload"] if self.infctx_offload else []),
        ]
        if changed and not self.chunked:
            yield f"--{changed[0]} goes with --train_type infctx"
        if self.chunked and self.chunk_ctx % self.context_parallel:
            yield (
                f"--context_parallel {self.context_parallel} must divide --chunk_ctx "
                f"{self.chunk_ctx}"
            )


def config_yaml(config: TrainConfig) -> str:
    """A configuration as the YAML file that --config takes back."""
    import yaml  # slow to import

    values = {name: value for name, value in vars(config).items() if value is not None}
    for name, methods in flag_methods().items():
        if config.peft not in methods:
            values.pop(name, None)
    if config.global_bsz:
        values.pop("accumulate_grad_batches")  # follows from it
    names = [field.name for field in dataclasses.fields(config)]
    in_order = {name: values[name] for name in names if name in values}
    return yaml.safe_dump(in_order, sort_keys=False)
