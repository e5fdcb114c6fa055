"""The sizes that models of every generation have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from finchtune.errors import UserError

LARGEST = 10**9


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model; a generation adds its own. Raises UserError for sizes that do not fit.

    `dim_ffn` has a default in each generation.
    """

    may_be_zero: ClassVar[frozenset[str]] = frozenset()

    n_layer: int
    n_embd: int
    vocab_size: int
    dim_ffn: int = None  # type: ignore[assignment]  # filled in by the generation
    head_size: int = 64

    def __post_init__(self) -> None:
        for name, value in self.defaults().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, value in vars(self).items():
            if value < 1 and not (value == 0 and name in self.may_be_zero):
                raise UserError(f"{name} must be at least 1, not {value}")
            if value > LARGEST:
                raise UserError(f"{name} must be at most {LARGEST:,}, not {value}")
        if self.n_embd % self.head_size:
            raise UserError(
                f"head size {self.head_size} does not divide n_embd {self.n_embd}; "
                "choose `head_size_a` so that it does"
            )

    def defaults(self) -> dict[str, int]:
        """Sizes that follow from the others where they are not given."""
        raise NotImplementedError

    @property
    def n_head(self) -> int:
        return self.n_embd // self.head_size

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> Self:
        """Read every size off a weight file's tensors. Raises UserError if one cannot be read."""
        raise NotImplementedError
