"""What every adapter method has in common: the interface, and checks of hyperparameters."""

import copy
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finchtune.errors import UserError

BIG_RANK = 1024  # that of BigLoRA, which has it on layers of any size


class Adapter(nn.Module):
    """A trainable change of one frozen linear layer `y = W x`, W of shape (out, in).

    A method is a file in methods/: it subclasses this, sets `name`, takes its hyperparameters as
    keyword-only arguments with annotation and default written out, and writes `init`, `forward`
    and `merged`. Tensors are created in the constructor, so that shapes can be counted on the
    meta device. No tensor may be called `weight` or `bias`: in files the adapter's tensors stand
    beside the linear's own.
    """

    name: ClassVar[str]
    flags: ClassVar[dict[str, str]] = {}
    """Hyperparameter -> its flag, where that is not NAME_HYPERPARAMETER; "" for none."""
    help: ClassVar[dict[str, str]] = {}
    """Hyperparameter -> what --help says of its flag."""
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Hyperparameter -> the values that its flag takes, if they are few."""
    training_flags: ClassVar[tuple[str, ...]] = ()
    """Flags of training that go with some methods only, this one among them."""
    reads_W: bool = False
    """Whether W itself is needed, not only products with it: then it cannot be quantised."""
    output_dims: ClassVar[dict[str, int]] = {}
    """Tensor -> its dimension that runs over the outputs. A method that says so promises that each
    row of `merged` depends on that row of W alone; files are then merged some rows at a time."""
    freezes_W: ClassVar[bool] = False
    """Whether W cannot be trained beside the adapter."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features

    def init(self, W: Tensor) -> None:
        """Set the adapter's own tensors from W (out, in). Never writes W."""
        raise NotImplementedError

    def init_from_gradient(self, W: Tensor, gradient: Tensor) -> None:
        """In place of `init` where the caller has the gradient of the loss by W, (out, in)."""
        raise UserError(f"{self.name} does not start from gradients; attach without them")

    def forward(self, x: Tensor, W: Tensor) -> Tensor:
        """x (..., in), W (out, in) of one dtype -> y (..., out) of that dtype, without a bias.

        Unless the method `reads_W`, W may be a QuantisedWeight, which `frozen_linear` takes too.
        """
        raise NotImplementedError

    def merged(self, W: Tensor) -> Tensor:
        """The weight (out, in) that alone computes what `forward` does (without dropout).

        Computed and returned in float32 (float64 if W is), so that merging rounds only once.
        """
        raise NotImplementedError

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """A (r, in), B (out, r) and a scale, with which `merged` gives W + scale B A.

        So runtimes that know LoRA alone can take the adapter without merging. Raises UserError for
        methods whose change is no such product.
        """
        raise UserError(f"what {self.name} adds is no LoRA; merge it, with merge/merge.py")

    def shard_map(self) -> Tensor | None:
        """D (in/r, r, r), if `merged` gives W_ab + W_ab D_b + D_b for the r x r shards of W.

        So text can be written with products with W alone, see `move_shards`.
        """
        return None

    def of_outputs(self, begin: int, end: int) -> "Adapter":
        """The same change of the outputs from `begin` to `end` alone; its tensors are views."""
        part = copy.copy(self)
        part.out_features = end - begin
        part._parameters = {
            name: nn.Parameter(self.outputs_of(name, tensor, begin, end), requires_grad=False)
            for name, tensor in self.named_parameters()
        }
        part._buffers = {
            name: self.outputs_of(name, tensor, begin, end) for name, tensor in self.named_buffers()
        }
        return part

    def outputs_of(self, name: str, tensor: Tensor, begin: int, end: int) -> Tensor:
        """A tensor's part for some outputs; all of it where no dimension runs over them."""
        dim = self.output_dims.get(name)
        tensor = tensor.detach()
        return tensor if dim is None else tensor.narrow(dim, begin, end - begin)

    def unmerged(self, W: Tensor) -> Tensor:
        """The base weight (out, in) that `merged` would turn into W; the precision is the same.

        This form holds for methods that add something which does not depend on the base.
        """
        W = W.to(merge_precision(W))
        return W - self.merged(torch.zeros_like(W))


def merge_precision(W: Tensor) -> torch.dtype:
    """The dtype to merge in: float32, or float64 if W has it."""
    return torch.promote_types(W.dtype, torch.float32)


def check_positive_int(name: str, value: Any) -> None:
    """Raise UserError unless a hyperparameter is a whole number above zero."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} must be a whole number above 0, not {value!r}")


def check_at_most(name: str, value: int, most: int, what: str) -> None:
    """Raise UserError for a size above what a layer can make use of."""
    if value > most:
        raise UserError(f"{name} = {value:,} is above {most:,}, {what}; choose a smaller {name}")


def check_rank(r: int, in_features: int, out_features: int) -> None:
    """Raise UserError for a rank without any use: above both the layer's sides and BigLoRA's."""
    most = max(in_features, out_features, BIG_RANK)
    check_at_most("r", r, most, "the longest side of the layer")


def check_positive(name: str, value: Any) -> None:
    """Raise UserError unless a hyperparameter is a number above zero."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise UserError(f"{name} must be a number above 0, not {value!r}")
