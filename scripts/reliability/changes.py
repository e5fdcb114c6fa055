"""Changes of files by what they are: bytes, JSON values, named tensors."""

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from harness import EITHER, READ, REFUSED, Change
from torch import Tensor

Named = Iterator[tuple[str, Change, str]]
"""What a change is called, the change, and what has to come of it."""

NESTED = "[" * 100_000 + "]" * 100_000
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), 2**63, 0.5),
    *("", "x", "\x1b[31mred", "../up", "a\0b", "\ud800", "9" * 400),
    *([], [1], {}, {"a": {"b": []}}),
)
"""What a value of a JSON may be instead."""


def bytes_changes(name: str, rng: random.Random, n: int, wanted: str = EITHER) -> Named:
    """Flipped bits, cuts, additions, words overwritten, and files that are something else."""
    for _ in range(n):
        place, bit = rng.random(), rng.randrange(8)
        yield f"bit {bit} at {place:.4f}", flipped(name, place, bit), wanted
    for _ in range(max(1, n // 4)):
        place, word = (
            rng.random(),
            rng.choice((0, -1, 2**63 - 1, 2**31, 10**9, rng.getrandbits(62))),
        )
        yield f"word {word} at {place:.4f}", overwritten(name, place, word), wanted
    for share in (0.0, 0.01, rng.random(), rng.random(), 0.999):
        yield f"cut at {share:.3f}", cut(name, share), wanted if share else REFUSED
    yield "bytes added", added(name, b"\0" * 7), wanted
    for what, content in FOREIGN.items():
        yield what, replaced(name, content), REFUSED
    yield "missing", lambda folder: (folder / name).unlink(), wanted
    yield "a folder", as_folder(name), REFUSED
    yield "a link to nothing", as_link(name, "nowhere"), wanted
    yield "a link to itself", as_link(name, name.rpartition("/")[2]), wanted


WORDS = (0, -1, 2**63 - 1, 2**31, 10**9)
FOREIGN = {
    "a web page": b"<!DOCTYPE html><html>not here</html>",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zeros": bytes(4096),
    "text": b"\x1b]0;taken\x07 hello\n" * 9,
}


def flipped(name: str, place: float, bit: int) -> Change:
    """One bit the other way round, at a share of the file's length."""

    def change(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        raw[int(place * len(raw))] ^= 1 << bit
        (folder / name).write_bytes(raw)

    return change


def overwritten(name: str, place: float, word: int) -> Change:
    """Eight bytes that are a number."""

    def change(folder: Path) -> None:
        raw = bytearray((folder / name).read_bytes())
        at = int(place * len(raw))
        raw[at : at + 8] = struct.pack("<q", word)[: len(raw) - at]
        (folder / name).write_bytes(raw)

    return change


def cut(name: str, share: float) -> Change:
    """The first part only."""

    def change(folder: Path) -> None:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: int(share * len(raw))])

    return change


def added(name: str, more: bytes) -> Change:
    """Something behind the end."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + more)


def replaced(name: str, content: bytes) -> Change:
    """Another content."""
    return lambda folder: (folder / name).write_bytes(content)


def as_folder(name: str) -> Change:
    """A folder of that name."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def as_link(name: str, target: str) -> Change:
    """A link instead of the file."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return change


def json_changes(name: str, rng: random.Random, n: int, wanted: str = EITHER) -> Named:
    """Keys that are missing or have another value, and texts that are no such JSON at all."""
    for _ in range(n):
        seed, value = rng.getrandbits(32), rng.choice(VALUES)
        yield f"value {value!r:.20} ({seed})", at_random(name, seed, value), wanted
    for _ in range(n // 2):
        seed = rng.getrandbits(32)
        yield f"key missing ({seed})", at_random(name, seed), wanted
    for text in ("", "{", "[]", "null", "3", '"x"', "{}", "\ufeff{}", NESTED):
        yield f"text {text[:9]!r}", replaced(name, text.encode()), wanted
    yield "latin-1", replaced(name, b'{"a": "\xe9"}'), wanted


def at_random(name: str, seed: int, *value: Any, seal: Change = lambda folder: None) -> Change:
    """A value of a JSON somewhere in it replaced, or taken out where none is given."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        places = list(places_in(content))
        holder, key = random.Random(seed).choice(places)
        if value:
            holder[key] = value[0]
        else:
            del holder[key]
        (folder / name).write_bytes(json.dumps(content).encode("utf-8", "surrogatepass"))
        seal(folder)

    return change


def places_in(content: Any) -> Iterator[tuple[Any, Any]]:
    """(dict or list, key or index) of every value in a JSON."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield content, key
        if isinstance(value, dict | list):
            yield from places_in(value)


def tensor_changes(rng: random.Random) -> Iterator[tuple[str, Callable[[dict], dict], str]]:
    """Changes of a dict of tensors: (what, the change, what has to come of it)."""
    for prefix in ("module.", "_orig_mod.", "model."):
        yield f"prefix {prefix}", lambda t, p=prefix: {p + k: v for k, v in t.items()}, READ
    for wrapper in ("state_dict", "model", "module"):
        yield f"inside {wrapper}", lambda t, w=wrapper: {w: t}, READ
    for what, change, wanted in ONE_TENSOR:
        seed = rng.getrandbits(32)
        yield f"one tensor {what} ({seed})", on_one(change, seed), wanted
    for layer in ("1000000000", "9" * 30, "x", "-1", "1.5", "02", "\u0663", ""):
        yield f"layer {layer[:12]}", lambda t, n=layer: with_layer(t, n), REFUSED
    yield "extra tensor", lambda t: t | {"odd\x1b[31m.weight": torch.zeros(3)}, REFUSED
    yield "no tensors", lambda t: {}, REFUSED
    yield "an object", lambda t: t | {"when": print}, REFUSED
    yield "a number among tensors", lambda t: t | {"step": 3}, REFUSED
    yield "no dict", lambda t: list(t.values()), REFUSED
    yield "nested twice", lambda t: {"a": {"b": t}}, REFUSED


ONE_TENSOR: tuple[tuple[str, Callable[[Tensor], Any], str], ...] = (
    ("transposed in memory", lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), READ),
    ("in a larger storage", lambda t: torch.cat([t.reshape(-1)] * 2)[: t.numel()].view_as(t), READ),
    ("as a parameter", lambda t: torch.nn.Parameter(t), READ),
    ("int8", lambda t: t.to(torch.int8), REFUSED),
    ("complex", lambda t: t.to(torch.complex64), REFUSED),
    ("bool", lambda t: t > 0, REFUSED),
    ("fp8", lambda t: t.to(torch.float8_e4m3fn), REFUSED),
    ("sparse", lambda t: t.to_sparse(), REFUSED),
    ("on meta", lambda t: t.to("meta"), REFUSED),
    ("empty", lambda t: t[:0], REFUSED),
    ("a number", lambda t: t.sum(), REFUSED),
    ("with one more dimension", lambda t: t[None, None, None, None], REFUSED),
    ("longer", lambda t: torch.cat([t, t]), REFUSED),
    ("NaN", lambda t: torch.full_like(t, torch.nan), REFUSED),
    ("with one infinity", lambda t: t.index_fill(0, torch.tensor(0), torch.inf), REFUSED),
    ("missing", lambda t: None, REFUSED),
    ("quantised", lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), REFUSED),
    ("expanded to 2^50 rows", lambda t: t.reshape(-1)[:1].expand(2**50, 1), REFUSED),
)


def on_one(change: Callable[[Tensor], Any], seed: int) -> Callable[[dict], dict]:
    """The change made of one tensor of a dict; None takes it out."""

    def changed(tensors: dict) -> dict:
        name = random.Random(seed).choice(sorted(tensors))
        new = tensors | {name: change(tensors[name])}
        return {k: v for k, v in new.items() if v is not None}

    return changed


def with_layer(tensors: dict, layer: str) -> dict:
    """The tensors and, of the last layer, one more of another number."""
    name = next(name for name in reversed(list(tensors)) if ".1." in name)
    return tensors | {name.replace(".1.", f".{layer}.", 1): tensors[name]}


def in_pth(name: str, change: Callable[[dict], Any]) -> Change:
    """A change of the dict in a .pth, which keeps nothing else that was in the file."""

    def changed(folder: Path) -> None:
        torch.save(change(torch.load(folder / name, weights_only=True)), folder / name)

    return changed
