"""The gradients of the weights to adapt, for methods that start from them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from finchtune.adapters.attaching import adapted_layers, find_targets, initialise
from finchtune.adapters.linear import AdaptedLinear


@contextmanager
def collected_gradients(
    model: nn.Module, targets: str | None = None
) -> Iterator[dict[str, Tensor]]:
    """Within, each backward adds d loss / d weight (out, in) of every target layer to a dict.

    It holds them by layer name: float32, on the CPU. Each is moved there as soon as backward has
    it, so that only one layer's is held on the device. A model that has adapters gives its adapted
    layers' gradients. Gradients of other parameters are not computed; every `requires_grad` and
    `.grad` is in the end as it was. Raises UserError if `targets` match nothing.
    """
    adapted = {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLinear)}
    layers = adapted or find_targets(model, targets)[0]
    names: dict[Tensor, str] = {layer.weight: name for name, layer in layers.items()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    gradients: dict[str, Tensor] = {}

    def take(weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.to("cpu", torch.float32, copy=True)
        earlier = gradients.get(names[weight])
        gradients[names[weight]] = gradient if earlier is None else earlier.add_(gradient)
        weight.grad = None

    model.requires_grad_(False)
    handles = []
    for weight in names:
        weight.requires_grad_(True)
        weight.grad = None
        handles.append(weight.register_post_accumulate_grad_hook(take))
    try:
        yield gradients
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


def weight_gradients(
    model: nn.Module, loss: Callable[[], Tensor], targets: str | None = None
) -> dict[str, Tensor]:
    """`collected_gradients` of one batch: `loss` runs the model on it and returns a scalar."""
    with collected_gradients(model, targets) as gradients:
        loss().backward()
    return gradients


def start_from_gradients(model: nn.Module, gradients: dict[str, Tensor]) -> None:
    """Let adapters that were attached with `init=False` start from gradients, freeing each."""
    for name, layer in adapted_layers(model).items():
        initialise(layer.adapter, name, layer, {name: gradients.pop(name)})
