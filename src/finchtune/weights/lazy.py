"""Named tensors that are not all in memory at once."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor


class LazyTensors(Mapping[str, Tensor]):
    """Named tensors, each made anew whenever it is asked for.

    `layout` has their shapes and dtypes, as tensors on the meta device, in the same order.
    `make_pieces` makes one in pieces of some rows each, where that is faster.
    """

    def __init__(
        self,
        layout: Mapping[str, Tensor],
        make: Callable[[str], Tensor],
        make_pieces: Callable[[str], Iterator[Tensor]] | None = None,
    ):
        self.layout, self._make, self._make_pieces = layout, make, make_pieces

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.layout:
            raise KeyError(name)
        return self._make(name)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A tensor in pieces, one below the other; they are to be used at once."""
        return self._make_pieces(name) if self._make_pieces else iter([self[name]])

    def __contains__(self, name: object) -> bool:
        return name in self.layout

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)


def layout_of(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same names with tensors of which only shape and dtype count; nothing is computed."""
    return tensors.layout if isinstance(tensors, LazyTensors) else tensors


def pieces_of(tensors: Mapping[str, Tensor], name: str) -> Iterator[Tensor]:
    """A tensor in the pieces that it is made in, one below the other."""
    return tensors.pieces(name) if isinstance(tensors, LazyTensors) else iter([tensors[name]])


def mapped(tensors: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> LazyTensors:
    """The tensors with `change(name, tensor)` made of each; it must take meta tensors too."""
    layout = {name: change(name, t.to("meta")) for name, t in layout_of(tensors).items()}
    return LazyTensors(layout, lambda name: change(name, tensors[name]))
