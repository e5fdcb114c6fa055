"""Adapter files: their tensors, the record of what they are, and reading both back."""

import re
from collections.abc import Iterable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune.adapters import attach, exactly, load_adapter_state
from finchtune.adapters.state import file_key, is_adapter_tensor
from finchtune.errors import CheckpointError
from finchtune.files import FileSet, json_text, read_json, sha256
from finchtune.models import INITIAL_STATE, LanguageModel
from finchtune.weights.base import load_model
from finchtune.weights.forms import FoundAdapter, adapter_form_of
from finchtune.weights.hashing import hashing
from finchtune.weights.pth import check_members, read_record, write_pth
from finchtune.weights.tensors import check_finite, check_shapes, finite, read_tensors, unwrapped

FORMAT = "finchtune 1"  # of an adapter file's record
INSIDE = ("format", "adapter", "base", "template")
"""What of a record lies in the .pth too: what the tensors mean, but not how they came about, since
the same tensors are to give the same file."""


def adapter_keys(model: LanguageModel) -> dict[str, str]:
    """Name in the model -> key in an adapter file, of every tensor that such a file holds.

    These are all tensors of the adapters (frozen initial ones too) and every other trained
    parameter; for full fine-tuning, the whole model.
    """
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    names = list(model.state_dict())
    if len(trained) < sum(1 for _ in model.parameters()):
        names = [name for name in names if name in trained or is_adapter_tensor(name)]
    return {name: file_key(name) for name in names}


def read_adapter(path: str | Path, initial: str | Path | None = None) -> dict[str, Tensor]:
    """An adapter file's tensors by plain key; `initial` is PiSSA's separate file of first A, B.

    Other software's spellings are understood: prefixes of wrappers, `.disha` for `.bone`, and the
    forms of llama.cpp, web-rwkv and peft. Raises UserError for NaN and infinity.
    """
    foreign = foreign_adapter(path)
    if foreign:
        check_finite(foreign.tensors, path)
        return foreign.tensors
    found: dict[str, Tensor] = {}
    for file in (path, *([initial] if initial else [])):
        tensors = unwrapped(read_tensors(file))
        check_finite(tensors, file)
        found |= {re.sub(r"\.disha$", ".bone", name): t for name, t in tensors.items()}
    return found


def foreign_adapter(path: str | Path) -> FoundAdapter | None:
    """The adapter in a file or folder of another software's form; None for a .pth."""
    form = adapter_form_of(path)
    return form.read_adapter(Path(path)) if form and form.read_adapter else None


def load_adapter(model: LanguageModel, path: str | Path, initial: str | Path | None = None) -> None:
    """Fill an adapted model's trained tensors from an adapter file.

    Raises UserError that lists missing, unknown and misshapen tensors; nothing is changed then.
    """
    tensors = read_adapter(path, initial)
    own = model.state_dict()
    names = {key: name for name, key in adapter_keys(model).items()}
    found = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    check_shapes(found, {key: tuple(own[name].shape) for key, name in names.items()}, path)
    with torch.no_grad():
        for key, name in names.items():
            own[name].copy_(tensors[key])


def save_adapter(
    tensors: Mapping[str, Tensor],
    record: dict[str, Any],
    path: str | Path,
    stream: Iterable[Tensor] | None = None,
) -> None:
    """Write `path` (.pth) with its record in it, and beside it the record and its sha256 as .json.

    They appear together. `stream` as in `write_tensors`. Raises UserError, and leaves what was
    there, if a tensor holds NaN or infinity, or if the .json there is none of ours.
    """
    path, beside = Path(path), Path(path).with_suffix(".json")
    require_ours(beside)
    good = finite(tensors, tensors.values() if stream is None else stream, path)
    with FileSet() as files:
        inside = {key: record[key] for key in INSIDE if key in record}
        digest = write_pth(tensors, good, files.add(path), inside)
        files.add(beside).write_text(json_text(record | {"sha256": digest}))


def require_ours(path: Path) -> None:
    """Raise UserError if a JSON is there that finchtune has not written, and must not replace."""
    if not path.exists():
        return
    content = read_json(path)
    if not isinstance(content, dict) or not {"sha256", "output"} & set(content):
        raise CheckpointError(
            f"{path} was not written by finchtune; choose another name for the output"
        )


def adapter_record(path: str | Path) -> dict[str, Any] | None:
    """The record in an adapter file or in the JSON beside it; None for files of other software.

    Forms of other software that tell method and settings give such a record too, without a base.
    Raises UserError if the file is not what it was when the record was written, or if the two
    records differ.
    """
    path = Path(path)
    foreign = foreign_adapter(path)
    if foreign:
        return {"format": FORMAT, "adapter": foreign.spec}
    beside = path.with_suffix(".json")
    if not path.exists():
        return None
    inside = read_record(path)
    if not beside.exists():
        if inside is None:
            return None
        check_members(path)
        return check_record(inside, path)
    record = check_record(read_json(beside), beside)
    if record.get("sha256") not in (None, sha256(path)):
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) does not match its checksum in "
            f"{beside.name}; copy both again, or take the JSON away if you changed the file"
        )
    if inside is not None and inside != {key: record[key] for key in INSIDE if key in record}:
        raise CheckpointError(
            f"{beside} differs from the record in {path.name} itself; take it away"
        )
    return record


def check_record(record: Any, path: Path) -> dict[str, Any]:
    """The record. Raises UserError if it is none, or one of a newer finchtune."""
    spec = record.get("adapter") if isinstance(record, dict) else None
    base = record.get("base", {"sha256": ""}) if isinstance(record, dict) else None
    sound = isinstance(spec, dict) and isinstance(spec.get("method", ""), str)
    if not sound or not isinstance(base, dict) or not isinstance(base.get("sha256"), str):
        raise CheckpointError(
            f"{path}: is no record of an adapter; take it away if it belongs elsewhere"
        )
    if record.get("format", FORMAT) != FORMAT:
        raise CheckpointError(
            f"{path}: the record's format is {record['format']!r}, but only {FORMAT!r} is known "
            "here; use the finchtune that wrote it"
        )
    return record


def check_base(
    record: dict[str, Any], base: str | Path, adapter: str | Path, digest: Future[str] | None = None
) -> None:
    """Raise UserError unless `base` is what the adapter was trained on, where that is told.

    `digest` is the base's hash, if it is being computed already.
    """
    if not (Path(base).is_file() or Path(base).is_dir()):  # a pipe or a device may never end
        raise CheckpointError(f"{base}: no such file or folder")
    known = record.get("base", {})
    if known and (digest or hashing(base)).result() != known.get("sha256"):
        raise CheckpointError(
            f"{base} is not the base of {adapter}, which was trained on "
            f"{known.get('file')} (sha256 {str(known.get('sha256'))[:12]}...)"
        )


def record_hash(record: dict[str, Any] | None) -> str | None:
    """The base's sha256 in an adapter's JSON."""
    return record.get("base", {}).get("sha256") if record else None


def adapted_model(
    base: str | Path, tensors: dict[str, Tensor], spec: dict[str, Any]
) -> LanguageModel:
    """The model, in float32, that an adapter file's `tensors` make of a base file.

    `spec` is {} for a fully tuned model. Raises UserError for tensors that do not fit.
    """
    model = load_model(base)
    if any(key.endswith(INITIAL_STATE) for key in tensors):
        model.add_initial_state()
    own = model.state_dict()
    trained = {key: tensor for key, tensor in tensors.items() if key in own}
    with torch.no_grad():
        for key, tensor in trained.items():
            own[key].copy_(tensor)
    if spec:
        rest = {key: tensor for key, tensor in tensors.items() if key not in trained}
        # Files of other software do not say which layers they are for, but show it.
        layers = sorted({key.rpartition(".")[0] for key in rest})
        targets = exactly(map(re.escape, layers))
        attach(model, init=False, **({"targets": targets} | spec))
        load_adapter_state(model, rest)
    return model.float().eval()
