"""From the flags to a model and its data: what is trained, and on which rows."""

import dataclasses

import torch
from torch import Tensor

from finchtune import distributed
from finchtune.adapters import (
    QuantisedWeight,
    adapted_layers,
    attach,
    block_targets,
    collected_gradients,
    quantise_linears,
    start_from_gradients,
)
from finchtune.config import STATE_LR, TrainConfig
from finchtune.data import Data, load_data, templates
from finchtune.data.chunks import cut
from finchtune.data.load import require_sources
from finchtune.errors import UserError
from finchtune.memory.estimate import ModelPlan
from finchtune.models import LanguageModel, ModelSizes, generation_of_sizes, meta_model
from finchtune.ops.cross_entropy import IGNORE
from finchtune.tokenizer import load_tokenizer
from finchtune.training.chunked import exact_backward, own_calls
from finchtune.training.warm_start import start_from_file
from finchtune.weights.base import load_model


def build_model(config: TrainConfig, dtype: torch.dtype, device: torch.device) -> LanguageModel:
    """The base model with its adapters, and exactly the wanted parameters trainable."""
    # Quantised from the file as it is, one layer at a time: the codes do not depend on `dtype`,
    # and the device never holds the whole weights.
    quantised = config.quant != "none"
    # What is trained is written, and every process needs pages of its own for it.
    shared = not config.trains_all and device.type == "cpu" and distributed.world_size() > 1
    model = load_model(
        config.load_model,
        None if quantised else dtype,
        None if quantised else device,
        config.grad_cp,
        shared,
    )
    check_sizes(config, model.config)
    choose_trained(model, config, not config.peft_load and config.peft != "lora_ga", device)
    model.to(device=device, dtype=dtype)
    if config.peft_load:
        start_from_file(model, config)
    return model


def planned_model(config: TrainConfig, sizes: ModelSizes, dtype: torch.dtype) -> LanguageModel:
    """What `build_model` makes of a base of these sizes, on the meta device."""
    check_sizes(config, sizes)
    model = meta_model(sizes, config.grad_cp)
    choose_trained(model, config, init=False)
    return model.to(dtype)


def model_plan(config: TrainConfig, sizes: ModelSizes, dtype: torch.dtype) -> ModelPlan:
    """`planned_model` as the estimates of memory need it."""

    def make(n_layer: int) -> LanguageModel:
        return planned_model(config, dataclasses.replace(sizes, n_layer=n_layer), dtype)

    return ModelPlan(make, sizes.n_layer)


def choose_trained(
    model: LanguageModel, config: TrainConfig, init: bool, device: torch.device | None = None
) -> None:
    """Attach --peft, add trained states, and make exactly the wanted parameters trainable.

    `init`: whether adapters set their own tensors. `device`: where a quantised base is made, and
    stays; none for where the model is. Raises UserError for what cannot be trained.
    """
    model.requires_grad_(config.trains_all)
    if config.adapter != "none":
        targets = block_targets(config.target)
        settings = config.adapter_hyperparameters
        attach(model, config.adapter, targets=targets, init=init, quant_device=device, **settings)
    elif config.quant != "none":
        quantise_linears(model, config.quant, device)
    if config.trains_state:
        model.add_initial_state()
        for state in model.initial_states().values():
            state.requires_grad_(True)
    for part in config.train_parts:
        train_part(model, part)


def train_part(model: LanguageModel, part: str) -> None:
    """Make the parameters with `part` in their names trainable; UserError if that cannot be."""
    chosen = {name: p for name, p in model.named_parameters() if part in name}
    modules = model.named_modules()
    coded = [name for name, m in modules if isinstance(m, QuantisedWeight) and part in name]
    if coded and part:
        raise UserError(
            f"`train_parts` {part}: {coded[0]} is quantised, and cannot be trained itself; name "
            "other parts, or drop `quant`"
        )
    if not chosen or not part:
        raise UserError(f"`train_parts` {part or repr(part)}: no parameter has this in its name")
    layers = adapted_layers(model) if hasattr(model, "adapter_spec") else {}
    for name, layer in layers.items():
        if layer.adapter.freezes_W and f"{name}.weight" in chosen:
            raise UserError(
                f"`train_parts` {part}: {name} has an adapter of {layer.adapter.name}, beside "
                "which its weight cannot be trained; name other parts, or choose another `peft`"
            )
    for parameter in chosen.values():
        parameter.requires_grad_(True)


def describe_parameters(model: LanguageModel) -> str:
    """How many parameters a model has, in which dtype, and how many are trained."""
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return (
        f"{sum(p.numel() for p in parameters) / 1e6:,.2f} M parameters in {parameters[0].dtype}, "
        f"{trained / 1e6:,.2f} M trained"
    )


def start_from_data(
    model: LanguageModel, config: TrainConfig, data: Data, device: torch.device
) -> None:
    """Start a method that begins at the gradient of the run's first rows (lora_ga).

    Rank 0 computes it, whatever the number of processes; the others take its tensors as DeepSpeed
    starts. Needs the gradients of all adapted weights in rank 0's memory, in float32; long
    contexts are read in chunks as in a step. A collective call, before DeepSpeed divides the model;
    does nothing for other methods.
    """
    if config.peft != "lora_ga" or config.peft_load:
        return

    def compute() -> None:
        batches = data.rows(0, 0, 1, config.micro_bsz, config.lora_ga_batches)
        valid = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
        length = config.chunk_ctx if config.chunked else max(b.tokens.shape[1] for b in batches)

        def backward(loss: Tensor, added: Tensor) -> None:
            (loss / max(1, valid) + added).backward()

        with collected_gradients(model) as gradients:
            for batch in batches:
                chunks = cut(batch.to(device), length)
                exact_backward(*own_calls(model), chunks, backward, config.infctx_offload)
        start_from_gradients(model, gradients)

    distributed.run_on_rank_zero(compute)


def check_processes(config: TrainConfig) -> None:
    """Raise UserError unless the processes can share contexts as asked; warn of a rash rate."""
    world, sharing = distributed.world_size(), config.context_parallel
    if world % sharing:
        raise UserError(
            f"`context_parallel` {sharing} does not divide the {world} processes; choose `devices` "
            "so that it does"
        )
    if config.trains_state and config.state_lr > STATE_LR:
        distributed.print_rank_zero(
            f"warning: a learning rate of {config.state_lr:g} for states is above {STATE_LR:g}, "
            "the usual one; watch the loss"
        )


def check_sizes(config: TrainConfig, sizes: ModelSizes) -> None:
    """Raise UserError if a size given as a flag contradicts the weight file."""
    generation = generation_of_sizes(sizes).name
    if config.my_testing not in (None, generation):
        raise UserError(
            f"`my_testing` {config.my_testing} contradicts {config.load_model}, which is "
            f"{generation}; drop the flag, the generation is read off the file"
        )
    in_file = {
        "n_layer": sizes.n_layer,
        "n_embd": sizes.n_embd,
        "vocab_size": sizes.vocab_size,
        "head_size_a": sizes.head_size,
        "dim_att": sizes.n_embd,
        "dim_ffn": sizes.dim_ffn,
    }
    for name, value in in_file.items():
        given = getattr(config, name)
        if given not in (None, value):
            raise UserError(
                f"`{name}` {given} contradicts {config.load_model}, where it is {value}; "
                "drop the flag, sizes are read off the file"
            )


def require_data(config: TrainConfig) -> None:
    """Raise UserError unless the data and the template are there: before the model is built."""
    if config.template:
        templates.get(config.template)
    data_type = "sft" if config.sft_field else config.data_type
    for data_file in filter(None, (config.data_file, config.val_file)):
        require_sources(data_file, data_type)


def open_data(config: TrainConfig, vocab_size: int) -> Data:
    """The rows that a run trains on, with what it holds out as their `validation`.

    Raises UserError for flags or data that cannot be used.
    """

    # Planning writes nothing.
    cache_dir = None if config.plan else config.data_cache or f"{config.proj_dir}/data_cache"

    def load(data_file: str, val_split: float) -> Data:
        return load_data(
            data_file,
            data_type="sft" if config.sft_field else config.data_type,
            dataload=config.dataload,
            ctx_len=config.ctx_len,
            loss_mask=config.loss_mask,
            sft_field=config.sft_field,
            tokenizer=load_tokenizer(config.tokenizer, vocab_size),
            vocab_size=vocab_size,
            seed=config.random_seed,
            on_bad=config.on_bad,
            val_split=val_split,
            cache_dir=cache_dir,
            template=config.template,
            speakers=config.speakers,
            whole=config.chunked,
        )

    data = load(config.data_file, config.val_split)
    if config.val_file:
        data.validation = load(config.val_file, 0.0)
    return data
