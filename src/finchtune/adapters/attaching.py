"""Putting adapters on a model's linear layers, and merging them into its weights."""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from finchtune.adapters.base import Adapter, merge_precision
from finchtune.adapters.linear import AdaptedLinear, QuantisedLinear
from finchtune.adapters.registry import get_method, resolve
from finchtune.errors import UserError

RWKV_TARGETS = (
    r"(.+\.)?blocks\.\d+\.(att\.(receptance|key|value|gate|output)|ffn\.(key|receptance|value))"
)
"""The large linears of each block of an RWKV, by the names that every generation gives them."""

LINEARS = (
    *(f"att.{name}" for name in ("receptance", "key", "value", "gate", "output")),
    *(f"ffn.{name}" for name in ("key", "receptance", "value")),
)
"""The same linears by their names in a block."""

OTHER_TARGETS = r"(?!(.+\.)?(head|lm_head|classifier|score|qa_outputs|embed_out)(\.|$)).+"
"""Every linear but those under the usual names of an output layer."""


def attach(
    model: nn.Module,
    method: str,
    *,
    targets: str | None = None,
    init: bool = True,
    gradients: Mapping[str, Tensor] | None = None,
    quant: str | None = None,
    quant_device: torch.device | None = None,
    **hyperparameters: Any,
) -> nn.Module:
    """Freeze a model and put an adapter on its linear layers, in place.

    `targets` is a regular expression that a layer's full name must match; None takes the
    linears of each block of an RWKV, and of any other model all but the output layer.
    Adapter tensors are float32 (float64 on a float64 weight) on the weight's device. With
    `init=False` they stay zero, for `load_adapter_state`. `gradients` holds the gradient of
    each layer's weight, for methods that start from it (lora_ga). `quant` ("nf4", "fp4", "int8",
    "fp8", or "fp8_compute", which multiplies in fp8 too) keeps the frozen weights of the adapted
    layers in that form, made on `quant_device` if that is given; adapters start from the weights
    as they were.

    `model.adapter_spec` records the method, every hyperparameter and the targets, such that
    `attach(model, **spec)` does the same again; it fits into JSON.

    Raises UserError, before anything is changed, for an unknown method or hyperparameter, a
    value that does not fit a layer, a model that has adapters, or targets that match nothing.
    """
    kind = get_method(method)
    settings = resolve(kind, hyperparameters)
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise UserError("this model already has adapters; merge them or start from the base model")
    layers, pattern = find_targets(model, targets)
    adapters = {name: build(kind, name, layer, settings) for name, layer in layers.items()}
    refuse_fast_path(model, layers)
    if quant and any(adapter.reads_W for adapter in adapters.values()):
        raise UserError(
            f"{method} needs the weights themselves, not only products with them: it does not "
            "go with a quantised base; bone, bat in row mode, lora and pissa do"
        )
    if init:
        for name, adapter in adapters.items():
            initialise(adapter, name, layers[name], gradients)
    adapted = {}
    for name, layer in layers.items():
        with naming(name):
            adapted[id(layer)] = AdaptedLinear(layer, adapters[name], quant, quant_device)
    model.requires_grad_(False)
    replace_modules(model, adapted)
    for adapter in adapters.values():
        adapter.requires_grad_(True)
    spec = {"method": method, "targets": pattern, **settings}
    cast(Any, model).adapter_spec = spec | ({"quant": quant} if quant else {})
    return model


def quantise_linears(model: nn.Module, quant: str, device: torch.device | None = None) -> None:
    """Keep the weights that `attach` would put adapters on in few bits, in place, frozen.

    `quant` as in `attach`; the codes are made on `device` if that is given, and stay there. No file
    holds them: they follow from the base's. Raises UserError for NaN and infinity.
    """
    quantised = {}
    for name, layer in find_targets(model)[0].items():
        with naming(name):
            quantised[id(layer)] = QuantisedLinear(layer, quant, device)
    replace_modules(model, quantised)


@contextmanager
def naming(layer: str) -> Iterator[None]:
    """Within, a UserError says which layer it is of."""
    try:
        yield
    except UserError as error:
        raise UserError(f"layer {layer}: {error}") from None


def find_targets(model: nn.Module, targets: str | None = None) -> tuple[dict[str, nn.Linear], str]:
    """The linear layers that `targets` chooses, by full name, and the pattern that chose them."""
    # A subclass may read its weight elsewhere than in forward, past an adapter.
    linears = {name: m for name, m in model.named_modules() if name and type(m) is nn.Linear}
    if targets is None:
        is_rwkv = any(re.fullmatch(RWKV_TARGETS, name) for name in linears)
        targets = RWKV_TARGETS if is_rwkv else OTHER_TARGETS
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise UserError(f"targets {targets!r} is not a regular expression: {error}") from None
    chosen = {name: linear for name, linear in linears.items() if pattern.fullmatch(name)}
    if not chosen:
        examples = ", ".join(list(linears)[:3]) or "none"
        raise UserError(
            f"targets {targets!r} matches no linear layer of this model; "
            f"it has {len(linears)}: {examples}{', ...' if len(linears) > 3 else ''}"
        )
    return chosen, targets


def block_targets(names: Iterable[str]) -> str:
    """The pattern of those large linears of each block that names choose; of all for no names.

    A name is a linear's (ffn.key), a part's (att), or a last name that both parts have (key).
    Raises UserError for one that chooses nothing.
    """
    chosen = set()
    for name in names:
        found = {linear for linear in LINEARS if name in (linear, *linear.split("."))}
        if not found:
            raise UserError(f"`target` {name}: known are att, ffn, {', '.join(LINEARS)}")
        chosen |= found
    if not chosen or len(chosen) == len(LINEARS):
        return RWKV_TARGETS
    return exactly(rf"blocks\.\d+\.{re.escape(linear)}" for linear in LINEARS if linear in chosen)


def exactly(patterns: Iterable[str]) -> str:
    """The pattern of the layers whose names match one of several, in whatever module they are."""
    return rf"(.+\.)?({'|'.join(patterns)})"


def targets_of(layers: Iterable[str]) -> list[str]:
    """The linears of a block that some of the layers are, as `block_targets` takes them.

    [] if they are all of them.
    """
    names = {re.sub(r"^(.+\.)?blocks\.\d+\.", "", layer) for layer in layers}
    found = [linear for linear in LINEARS if linear in names]
    return [] if len(found) == len(LINEARS) else found


def build(kind: type[Adapter], name: str, layer: nn.Linear, settings: dict[str, Any]) -> Adapter:
    """An adapter for one layer, on its device; a misfit raises UserError naming the layer."""
    with naming(name), layer.weight.device:
        adapter = kind(layer.in_features, layer.out_features, **settings)
    return adapter.to(merge_precision(layer.weight)).train(layer.training)


def initialise(
    adapter: Adapter,
    name: str,
    layer: nn.Linear | AdaptedLinear,
    gradients: Mapping[str, Tensor] | None,
) -> None:
    """Let an adapter set its tensors; a misfit raises UserError naming the layer."""
    weight = layer.weight.detach()
    with naming(name):
        if gradients is None:
            adapter.init(weight)
            return
        if name not in gradients or gradients[name].shape != weight.shape:
            raise UserError(f"no gradient of shape {tuple(weight.shape)} was given")
        adapter.init_from_gradient(weight, gradients[name])


def refuse_fast_path(model: nn.Module, layers: dict[str, nn.Linear]) -> None:
    """Raise UserError where torch's fused encoder layer would read the weights past adapters."""
    chosen = set(layers.values())
    encoder_layers = [m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    touched = any(chosen & {layer.linear1, layer.linear2} for layer in encoder_layers)
    if touched and torch.backends.mha.get_fastpath_enabled():
        raise UserError(
            "in evaluation nn.TransformerEncoderLayer skips its linear layers' forward, and with "
            "it adapters; call torch.backends.mha.set_fastpath_enabled(False) first"
        )


def replace_modules(model: nn.Module, replacements: Mapping[int, nn.Module]) -> None:
    """Put `replacements` (by the id of the module to replace) wherever the module is used."""
    for parent in list(model.modules()):
        # named_children would leave out a second name of the same module.
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Merge the adapters into plain nn.Linear layers, in place.

    Every weight is computed in float32 (or float64) and rounded once to its own dtype. All
    merged weights are made before the first is put in: a model that fails is left as it was.

    Raises UserError for a model without adapters and for a merged weight with NaN or infinity.
    """
    layers = adapted_layers(model)
    replace_modules(
        model, {id(layer): merged_linear(name, layer) for name, layer in layers.items()}
    )
    del model.adapter_spec
    return model


def merged_linear(name: str, layer: AdaptedLinear) -> nn.Linear:
    """A frozen nn.Linear that computes what an adapted layer does."""
    weight = layer.adapter.merged(layer.dense_weight()).to(layer.weight.dtype)
    if not weight.isfinite().all():
        raise UserError(
            f"layer {name}: the merged weight holds NaN or infinity; nothing was merged"
        )
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = layer.bias
    return linear.train(layer.training)


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The layers with an adapter, by full name; a model without one raises UserError."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    if not layers:
        raise UserError("this model has no adapters; attach a method first")
    return layers
