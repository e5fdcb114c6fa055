"""Cases of weights: bases in every form, adapters and their records, receipts, trained states."""

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from changes import (
    VALUES,
    Named,
    at_random,
    bytes_changes,
    in_pth,
    json_changes,
    tensor_changes,
)
from harness import CHECKED, EITHER, READ, REFUSED, Case, Change

from finchtune.weights.forms import FORMS
from finchtune.weights.forms.safetensors import header_of

OUT = "out.safetensors"
STATED = ("--method", "lora", "--lora_alpha", "16", "--rslora", "0", "--quant", "none")
FAR = "1" + "0" * 32  # 32 bytes longer: the numbers of a GGUF begin at a multiple of that
LAYERS = ("blocks.", "blk.", "model.layers.", "rwkv.blocks.")


def base_commands(path: str) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """What reads a base: words, and what they write."""
    merge = ("merge", "--base_model", path, "--peft_checkpoint", "bare.pth", *STATED)
    export = ("export", "--model", path, "--to", "safetensors", "--dtype", "fp16")
    return [
        ((*merge, "--output", OUT), (OUT,)),
        ((*export, "--output", OUT), (OUT,)),
        (("generate", "--model", path, "--prompt", "1", "--tokens", "1"), ()),
        (("info", path), ()),
    ]


def cases_of(
    kind: str,
    changes: Named,
    commands: list[tuple[tuple[str, ...], tuple[str, ...]]],
    rng: random.Random,
) -> Iterator[Case]:
    """Each change, read by one command; `info` may describe what no command takes."""
    for name, change, wanted in changes:
        command, outputs = rng.choice(commands)
        described = command[0] == "info" and wanted == REFUSED
        yield Case(kind, name, change, command, EITHER if described else wanted, outputs)


def base_pth(rng: random.Random, n: int) -> Iterator[Case]:
    """A plain .pth: its bytes, and its tensors."""
    commands = base_commands("base.pth")
    yield from cases_of("base .pth", bytes_changes("base.pth", rng, n), commands, rng)
    for name, change, wanted in tensor_changes(rng):
        # Merging, exporting and running it must agree.
        for command, outputs in commands[: 3 if n > 20 else 1]:
            changed = in_pth("base.pth", change)
            yield Case("base .pth", name, changed, command, wanted, outputs)


def other_bases(rng: random.Random, n: int) -> Iterator[Case]:
    """The base in every other form: files by their bytes, folders by each of their files."""
    for form in FORMS.values():
        if not form.write or form.name == "pth":
            continue
        path, kind = f"{form.name}{form.suffix}", f"base, {form.name}"
        commands = base_commands(path)
        files = [path] if form.suffix else [f"{path}/model.safetensors"]
        for file in files:
            yield from cases_of(kind, bytes_changes(file, rng, n), commands, rng)
            yield from cases_of(kind, header_changes(file, rng, n), commands, rng)
        if not form.suffix:
            config = f"{path}/config.json"
            yield from cases_of(kind, json_changes(config, rng, n // 2), commands, rng)
        for command, _ in commands[: 3 if n > 20 else 1]:
            yield Case(kind, "a layer 10^32", renumbered(files[0]), command, REFUSED)


def header_changes(file: str, rng: random.Random, n: int) -> Named:
    """The JSON header of safetensors with values changed; nothing for other files."""
    if not file.endswith((".safetensors", ".st")):
        return
    for _ in range(n):
        seed, value = rng.getrandbits(32), rng.choice(VALUES)
        yield f"header value {value!r:.20} ({seed})", in_header(file, seed, value), EITHER
    for _ in range(n // 4):
        seed = rng.getrandbits(32)
        yield f"header key missing ({seed})", in_header(file, seed), EITHER


def in_header(file: str, seed: int, *value: object) -> Change:
    """A value in the header replaced, or taken out."""

    def change(folder: Path) -> None:
        path = folder / file
        raw = path.read_bytes()
        header = path.with_suffix(".header")
        header.write_text(json.dumps(header_of(path)))
        at_random(header.name, seed, *value)(path.parent)
        content = header.read_bytes()
        header.unlink()
        length = struct.unpack("<Q", raw[:8])[0]
        path.write_bytes(struct.pack("<Q", len(content)) + content + raw[8 + length :])

    return change


def renumbered(file: str) -> Change:
    """The last layer's number is another one, in whatever form."""

    def change(folder: Path) -> None:
        path = folder / file
        raw = path.read_bytes()
        if path.suffix in (".safetensors", ".st"):
            length = struct.unpack("<Q", raw[:8])[0]
            header = raw[8 : 8 + length]
            for prefix in LAYERS:
                header = header.replace(f'"{prefix}3.'.encode(), f'"{prefix}{FAR}.'.encode())
            raw = struct.pack("<Q", len(header)) + header + raw[8 + length :]
        else:
            raw = renamed_tensor(raw)
        path.write_bytes(raw)

    return change


def renamed_tensor(raw: bytes) -> bytes:
    """One name changed in a GGUF (its length before it) or rwkv.cpp's file (before its sizes)."""
    is_gguf = raw[:4] == b"GGUF"
    name = b"blk.3.attn_norm.weight" if is_gguf else b"blocks.3.ln1.weight"
    new = name.replace(b".3.", f".{FAR}.".encode())
    at = raw.index(name)
    place = at - (8 if is_gguf else 12)  # of the length; rwkv.cpp: dtype and one size after it
    form = "<Q" if is_gguf else "<i"
    size = struct.calcsize(form)
    assert struct.unpack(form, raw[place : place + size])[0] == len(name)
    head = raw[:place] + struct.pack(form, len(new)) + raw[place + size : at]
    return head + new + raw[at + len(name) :]


def adapters(rng: random.Random, n: int) -> Iterator[Case]:
    """Adapters without a record, with one in them, and with a JSON beside them too."""

    def merge(path: str, *more: str) -> tuple[str, ...]:
        words = ("merge", "--base_model", "base.pth", "--peft_checkpoint", path)
        return (*words, *more, "--output", OUT)

    bare, whole = [(merge("bare.pth", *STATED), (OUT,))], [(merge("rwkv-0.pth"), (OUT,))]
    inside = [(merge("recorded.pth"), (OUT,)), (("info", "recorded.pth"), ())]
    kind = "adapter without a record"
    yield from cases_of(kind, bytes_changes("bare.pth", rng, n), bare, rng)
    for name, change, wanted in tensor_changes(rng):
        loose = "missing" in name or "no tensors" in name
        changed = in_pth("bare.pth", change)
        yield Case(kind, name, changed, bare[0][0], EITHER if loose else wanted, (OUT,))
    # Every bit is covered: by the checksums in the file, or by that in its JSON.
    kind = "adapter with its record"
    yield from cases_of(kind, checked(bytes_changes("recorded.pth", rng, n)), inside[:1], rng)
    yield from cases_of(kind, checked(bytes_changes("rwkv-0.pth", rng, n)), whole, rng)
    kind = "an adapter's JSON"
    yield from cases_of(kind, bytes_changes("rwkv-0.json", rng, n // 2), whole, rng)
    yield from cases_of(kind, json_changes("rwkv-0.json", rng, n), whole, rng)


def checked(changes: Named) -> Named:
    """Changes that must be refused, unless nothing that is read has changed."""
    for name, change, wanted in changes:
        same = wanted == REFUSED or name in ("bytes added",)
        yield name, change, wanted if same else CHECKED


def other_adapters(rng: random.Random, n: int) -> Iterator[Case]:
    """Adapters of llama.cpp, web-rwkv and peft."""
    for form in FORMS.values():
        if not form.read_adapter:
            continue
        path, kind = f"lora-{form.name}{form.suffix}", f"adapter, {form.name}"
        words = ("merge", "--base_model", "base.pth", "--peft_checkpoint", path, "--output", OUT)
        commands = [(words, (OUT,)), (("info", path), ())]
        file = path if form.suffix else f"{path}/adapter_model.safetensors"
        yield from cases_of(kind, bytes_changes(file, rng, n), commands, rng)
        yield from cases_of(kind, header_changes(file, rng, n), commands, rng)
        if not form.suffix:
            config = json_changes(f"{path}/adapter_config.json", rng, n)
            yield from cases_of(kind, config, commands, rng)


def receipts(rng: random.Random, n: int) -> Iterator[Case]:
    """What lies beside merged weights."""
    words = ("unmerge", "--merged_model", "merged.pth", "--peft_checkpoint", "rwkv-0.pth")
    commands = [((*words, "--output", OUT), (OUT,)), (("info", "merged.pth"), ())]
    changes = [*bytes_changes("merged.merge.json", rng, n // 2)]
    changes += json_changes("merged.merge.json", rng, n)
    yield from cases_of("receipt of a merge", iter(changes), commands, rng)


def states(rng: random.Random, n: int) -> Iterator[Case]:
    """Trained states, made here: zeros for every block."""

    def write(change):
        def changed(folder: Path) -> None:
            shape = (4, 8, 8)
            good = {f"blocks.{i}.att.time_state": torch.zeros(shape) for i in range(4)}
            torch.save(change(good), folder / "states.pth")

        return changed

    words = ("generate", "--model", "base.pth", "--state", "states.pth", "--prompt", "1")
    for name, change, wanted in tensor_changes(rng):
        loose = "extra tensor" in name or wanted == READ
        yield Case("trained states", name, write(change), (*words, "--tokens", "1"),
                   EITHER if loose else wanted)  # fmt: skip


WEIGHTS = (base_pth, other_bases, adapters, other_adapters, receipts, states)
