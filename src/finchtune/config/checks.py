"""Values of flags, and pairs of values, that make a run impossible: a message for each."""

import dataclasses
import math
from collections.abc import Iterator
from importlib.util import find_spec

from finchtune.config import TrainConfig
from finchtune.config.flags import ContextFlags
from finchtune.errors import ConfigurationError
from finchtune.methods import method_flags

DESTRUCTIVE_LR = 0.05  # of all weights
AT_LEAST_ONE = {
    *("chunk_ctx", "context_parallel"),
    *("ctx_len", "accumulate_grad_batches", "lora_ga_batches"),
    *("epoch_count", "epoch_save", "devices", "num_nodes", "sample_tokens", "max_skips"),
    *("n_layer", "n_embd", "vocab_size", "head_size_a", "dim_att", "dim_ffn"),
    *(name for name, flag in method_flags().items() if flag.at_least_one),
}
AT_MOST = {
    **dict.fromkeys(("devices", "num_nodes"), 1024),
    **dict.fromkeys(("lr_init", "lr_final", "lr_state"), 10**4),
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


def validate(config: TrainConfig) -> None:
    """Raise ConfigurationError for all values, and pairs of values, that make no sense."""
    mistakes = list(mistakes_of(config))
    if mistakes:
        raise ConfigurationError(*mistakes)


def mistakes_of(config: TrainConfig) -> Iterator[str]:
    """Everything that is missing, out of range or contradictory."""
    yield from missing(config)
    yield from out_of_range(config)
    yield from contradictions(config)


def missing(config: TrainConfig) -> Iterator[str]:
    for name in ("load_model",) if config.plan else ("load_model", "data_file"):
        if not getattr(config, name):
            yield f"`{name}` is missing"
    for package in ("wandb", "tensorboard"):
        if getattr(config, package) and find_spec(package) is None:
            yield f"`{package}` needs the package: pip install {package}"


def out_of_range(config: TrainConfig) -> Iterator[str]:
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        least = 1 if name in AT_LEAST_ONE else 0
        if not math.isfinite(value):
            yield f"`{name}` must be a finite number, not {value}"
        elif value < least:
            yield f"`{name}` must be {'at least 1' if least else 'zero or more'}, not {value}"
        elif value > (most := AT_MOST.get(name, MOST)):
            yield f"`{name}` must be at most {most:,}, not {value:,}"
        elif name in BELOW_ONE and value >= 1:
            yield f"`{name}` must be below 1, not {value}"
        elif name in ABOVE_ZERO and value == 0:
            yield f"`{name}` must be above zero"
    if config.grad_cp not in (0, 1, 2):
        yield f"`grad_cp` must be 0, 1 or 2, not {config.grad_cp}"


def contradictions(config: TrainConfig) -> Iterator[str]:
    yield from contradictions_of_method(config)
    yield from contradictions_of_contexts(config)
    yield from contradictions_of_graphs(config)
    if config.lr_schedule == "exp" and config.lr_final == 0:
        yield "`lr_schedule` exp cannot reach `lr_final` 0; give a small number"
    if config.lr_schedule == "constant" and config.lr_final not in (None, config.lr_init):
        yield "`lr_schedule` constant has no use for `lr_final`; drop it or use cos"
    if config.micro_bsz == 0 and not config.global_bsz:
        yield "`micro_bsz` auto needs `global_bsz`, the rows of an optimizer step"
    if config.global_bsz and config.accumulate_grad_batches != 1:
        yield "`global_bsz` sets the accumulation; drop `accumulate_grad_batches`"
    held_out = [name for name in ("val_file", "val_split") if getattr(config, name)]
    if len(held_out) == 2:
        yield "`val_file` and `val_split` both name held-out data; choose one"
    for name in ("val_every", "early_stop"):
        if getattr(config, name) and not held_out:
            yield f"`{name}` needs held-out data: give `val_file` or `val_split`"
    if config.sample_every and not config.sample_prompt:
        yield "`sample_every` needs a `sample_prompt`"
    if config.data_type == "binidx" and config.sft_field:
        yield "`sft_field` goes with `data_type` jsonl; binidx files carry their masks"


def contradictions_of_method(config: TrainConfig) -> Iterator[str]:
    if config.pissa_init and not (config.peft == "pissa" and config.peft_load):
        yield "`pissa_init` goes with `peft` pissa and `peft_load`"
    if config.trains_all and (config.train_parts or config.peft_load):
        yield "`train_parts` and `peft_load` need `peft`; without it all is trained"
    if config.adapter == "none" and config.target:
        yield "`target` needs `peft`: it says which linears get an adapter"
    if config.trains_all and config.quant != "none":
        yield (
            "`quant` needs `peft`, or `train_type` state: a quantised weight cannot be trained "
            "itself"
        )
    if config.decay_adapters and not (config.weight_decay and config.adapter != "none"):
        yield "`decay_adapters` goes with `weight_decay` and `peft`"
    acts = config.trains_all or config.decay_adapters or config.train_parts
    if config.weight_decay and not acts:
        yield (
            f"`weight_decay` {config.weight_decay:g} would act on nothing: adapter matrices are "
            "not decayed unless `decay_adapters` 1 is given"
        )


def contradictions_of_contexts(config: TrainConfig) -> Iterator[str]:
    if config.trains_all and config.lr_init >= DESTRUCTIVE_LR:
        yield (
            f"`lr_init` {config.lr_init:g} would destroy a model whose every weight is trained; "
            "give `train_type` state if it is for states, else a lower rate"
        )
    if config.lr_state and not (config.trains_state and config.adapter != "none"):
        yield "`lr_state` goes with `train_type` state and an adapter; else give `lr_init`"
    changed = [
        *(["chunk_ctx"] if config.chunk_ctx != ContextFlags.chunk_ctx else []),
        *(["bptt"] if config.bptt != ContextFlags.bptt else []),
        *(["infctx_offload"] if config.infctx_offload else []),
    ]
    if changed and not config.chunked:
        yield f"`{changed[0]}` goes with `train_type` infctx"
    if config.chunked and config.chunk_ctx % config.context_parallel:
        yield (
            f"`context_parallel` {config.context_parallel} must divide `chunk_ctx` "
            f"{config.chunk_ctx}"
        )


def contradictions_of_graphs(config: TrainConfig) -> Iterator[str]:
    if not config.cuda_graphs:
        return
    if config.stage == 3:
        yield "`cuda_graphs` needs whole weights on each GPU: deepspeed_stage_1 or 2, not 3"
    if config.grad_cp != 1:
        yield f"`cuda_graphs` recomputes whole blocks: give `grad_cp` 1, not {config.grad_cp}"
    if config.chunked or config.context_parallel > 1:
        yield "`cuda_graphs` is for contexts read at once: not for infctx or `context_parallel`"
    if config.dataload == "pack":
        yield "`cuda_graphs` needs rows of one shape: not `dataload` pack, whose boundaries change"
