"""The gradients of the weights to adapt, for methods that start from them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from finchtune.adapters.attaching import find_targets


def weight_gradients(
    model: nn.Module, loss: Callable[[], Tensor], targets: str | None = None
) -> dict[str, Tensor]:
    """d loss / d weight (out, in) of every target layer, by layer name: float32, on the CPU.

    `loss` runs the model, not yet adapted, on a batch and returns a scalar. Each gradient is
    moved away as soon as backward has it, so that only one layer's is held on the device.
    Gradients of other parameters are not computed; every `requires_grad` and `.grad` is left as
    it was. Raises UserError if `targets` match nothing.
    """
    layers, _ = find_targets(model, targets)
    names = {layer.weight: name for name, layer in layers.items()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    gradients: dict[str, Tensor] = {}

    def take(weight: Tensor) -> None:
        assert weight.grad is not None
        gradients[names[weight]] = weight.grad.to("cpu", torch.float32, copy=True)
        weight.grad = None

    model.requires_grad_(False)
    handles = []
    for weight in names:
        weight.requires_grad_(True)
        weight.grad = None
        handles.append(weight.register_post_accumulate_grad_hook(take))
    try:
        loss().backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
    return gradients
