"""Which documents, or windows of the stream, stand in row i. Pure functions of (seed, i)."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from finchtune.data.documents import Documents
from finchtune.data.labels import Labels, count_targets, of_documents, of_windows


class Segment(NamedTuple):
    """L + 1 consecutive tokens of one document or window: L inputs, and their L targets.

    `trained` (L + 1,) uint8 says which may be targets; None means all.
    """

    ids: np.ndarray
    trained: np.ndarray | None
    document: int


@dataclass(frozen=True)
class Counts:
    """What one epoch of rows holds. `inputs` are tokens that the model reads, without padding."""

    documents: int
    tokens: int
    inputs: int
    targets: int


class Rows(Protocol):
    """Rows without end: row i is row i % n_rows of epoch i // n_rows."""

    n_rows: int

    def segments(self, index: int) -> list[Segment]: ...

    def counts(self) -> Counts: ...

    def labels(self) -> Labels: ...


def generator(seed: int, *stream: int) -> np.random.Generator:
    """Random numbers that depend on the arguments alone."""
    return np.random.default_rng([seed % 2**64, *stream])


class Shuffle:
    """index -> one of range(n), every one once per epoch, in another order in each."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, index: int) -> int:
        epoch, position = divmod(index, self.n)
        if epoch not in self._orders:
            # A step may straddle two epochs; older orders are of no more use.
            self._orders = {e: o for e, o in self._orders.items() if abs(e - epoch) == 1}
            self._orders[epoch] = generator(self.seed, epoch).permutation(self.n)
        return int(self._orders[epoch][position])


class DocumentRows:
    """`pad` and `only`: one document per row, cut after ctx_len + 1 tokens.

    `chosen` are the numbers of the documents to use, each of two tokens or more.
    """

    def __init__(self, documents: Documents, chosen: np.ndarray, ctx_len: int, seed: int):
        self.documents, self.chosen, self.ctx_len = documents, chosen, ctx_len
        self.n_rows = len(chosen)
        self._shuffle = Shuffle(self.n_rows, seed)

    def segments(self, index: int) -> list[Segment]:
        return [_cut(self.documents, int(self.chosen[self._shuffle(index)]), self.ctx_len)]

    def counts(self) -> Counts:
        return _count_documents(self.documents, self.chosen, self.ctx_len)

    def labels(self) -> Labels:
        return of_documents(self.documents, self.chosen, self.ctx_len)


class PackedRows:
    """`pack`: documents fitted into rows of at most ctx_len inputs, the rows shuffled.

    With `longest` documents are cut after longest + 1 tokens instead; one above ctx_len has a row
    of its own.
    """

    def __init__(
        self,
        documents: Documents,
        chosen: np.ndarray,
        ctx_len: int,
        seed: int,
        longest: int | None = None,
    ):
        self.documents, self.chosen, self.ctx_len = documents, chosen, longest or ctx_len
        shuffled = generator(seed).permutation(chosen)
        lengths = np.minimum(documents.sizes[shuffled] - 1, ctx_len)
        self.bins = [shuffled[members] for members in best_fit(lengths, ctx_len)]
        self.n_rows = len(self.bins)
        self._shuffle = Shuffle(self.n_rows, seed)

    def segments(self, index: int) -> list[Segment]:
        members = self.bins[self._shuffle(index)]
        return [_cut(self.documents, int(i), self.ctx_len) for i in members]

    def counts(self) -> Counts:
        return _count_documents(self.documents, self.chosen, self.ctx_len)

    def labels(self) -> Labels:
        return of_documents(self.documents, self.chosen, self.ctx_len)


class WindowRows:
    """`get`: windows of ctx_len + 1 tokens over the whole stream, each once per epoch.

    Window k starts at token k ctx_len. The order is RWKV-LM's: index cubed, times a factor near
    the golden section, modulo a prime p = 2 (mod 3), for which cubing is a bijection. Its prime
    lies below the number of windows and leaves the last ones out; here it is the first above,
    and a result that is no window is mapped on until one comes out, so that none is left out.
    """

    def __init__(self, documents: Documents, ctx_len: int, seed: int):
        self.documents, self.ctx_len, self.seed = documents, ctx_len, seed
        self.n_rows = (documents.n_tokens - 1) // ctx_len
        self.prime = magic_prime(self.n_rows)
        self._factor = round((5**0.5 - 1) / 2 * self.prime)

    def segments(self, index: int) -> list[Segment]:
        start = self.window(index) * self.ctx_len
        stop = start + self.ctx_len + 1
        trained = self.documents.trained
        document = int(np.searchsorted(self.documents.offsets, start, side="right")) - 1
        mask = None if trained is None else trained[start:stop]
        return [Segment(self.documents.tokens[start:stop], mask, document)]

    def window(self, index: int) -> int:
        """The window in row `index`; seed and epoch turn the order round."""
        epoch, position = divmod(index, self.n_rows)
        turn = int(generator(self.seed, epoch).integers(self.prime))
        while True:
            position = self._factor * (position + turn) ** 3 % self.prime
            if position < self.n_rows:
                return position

    def counts(self) -> Counts:
        inputs, trained = self.n_rows * self.ctx_len, self.documents.trained
        targets = inputs if trained is None else int(trained[1 : inputs + 1].sum(dtype=np.int64))
        return Counts(len(self.documents), self.documents.n_tokens, inputs, targets)

    def labels(self) -> Labels:
        return of_windows(self.documents, self.n_rows, self.ctx_len)


def _cut(documents: Documents, i: int, ctx_len: int) -> Segment:
    """The first ctx_len + 1 tokens of document i."""
    start, stop = int(documents.offsets[i]), int(documents.offsets[i + 1])
    stop = min(stop, start + ctx_len + 1)
    mask = None if documents.trained is None else documents.trained[start:stop]
    return Segment(documents.tokens[start:stop], mask, i)


def _count_documents(documents: Documents, chosen: np.ndarray, ctx_len: int) -> Counts:
    starts, sizes = documents.offsets[chosen], documents.sizes[chosen]
    inputs = np.minimum(sizes - 1, ctx_len)
    targets = count_targets(documents, starts, inputs)
    return Counts(len(chosen), int(sizes.sum()), int(inputs.sum()), int(targets.sum()))


def magic_prime(n: int) -> int:
    """The smallest prime p >= n with p = 2 (mod 3)."""
    p = max(n, 2)
    while p % 3 != 2 or any(p % d == 0 for d in range(2, int(p**0.5) + 1)):
        p += 1
    return p


def best_fit(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Bins of indices into `lengths`, no bin's sum above `capacity`, every index in one bin.

    Longest first, each into the fullest bin that still takes it (best-fit decreasing: at most
    11/9 of the fewest bins possible, plus a constant; Johnson 1973). Bit c of `free` says that
    some bin has c places left, which makes finding one a few machine words' work.
    """
    bins: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    free = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        fitting = free >> length << length
        if fitting:
            room = (fitting & -fitting).bit_length() - 1
            target = with_room[room].pop()
            if not with_room[room]:
                free ^= 1 << room
            bins[target].append(i)
        else:
            room, target = capacity, len(bins)
            bins.append([i])
        with_room[room - length].append(target)
        free |= 1 << (room - length)
    return [np.array(members) for members in bins]
