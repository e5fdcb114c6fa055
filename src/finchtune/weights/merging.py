"""Adapter + base -> plain weights that every RWKV runtime loads, and the way back.

No method's maths stands here: a weight is what its adapter's own `merged` or `unmerged` says.
Tensors are read, changed and written one at a time.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune.adapters import Adapter, QuantisedWeight, get_method, hyperparameters_of
from finchtune.adapters.residual import ResidualLoRA
from finchtune.errors import UserError
from finchtune.files import FileSet, atomic_path, json_text, read_json, sha256
from finchtune.models import INITIAL_STATE, sizes_of
from finchtune.weights.adapter_files import adapter_record, check_base, read_adapter, require_ours
from finchtune.weights.base import fitting_model, read_base
from finchtune.weights.forms.safetensors import write_safetensors
from finchtune.weights.lazy import LazyTensors, layout_of
from finchtune.weights.pth import write_pth
from finchtune.weights.stated import spec_of
from finchtune.weights.tensors import check_finite, check_shapes

CHUNK = 2**18  # elements compared at a time

Changes = Mapping[str, dict[str, Tensor]]
"""Base name -> what changes it: {adapter tensor name: tensor}, or {"": the new weight}."""


def merge_files(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    methods: Collection[str] | None = None,
    stated: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    initial: str | Path | None = None,
    device: str = "cpu",
    check: Callable[[Path, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Merge an adapter file into a base file and write `output` in the base's dtype and key order.

    The adapter's record says how. Files of other software have none: their method and sizes are
    read off the tensors, what these do not tell has to be `stated` where it has no `defaults`, and
    `initial` is PiSSA's second file.
    `methods` restricts what is accepted. Weights are computed on `device`. `check(path, spec)` is
    called with the written file before it gets its name; what it raises undoes everything.

    Returns, and writes beside `output` as .merge.json, a receipt: the sha256 of base, adapter and
    output, the method, the largest change of each tensor, and counts of the tensors merged,
    replaced and kept.

    Raises UserError for a wrong base, one that would not load, tensors left over, or NaN or
    infinity; `output` is then not written.
    """
    record = adapter_record(adapter)
    if record:
        check_base(record, base, adapter)
    tensors, weights = read_adapter(adapter, initial), read_base(base)
    fitting_model(weights, base)
    weights = with_initial_states(weights, tensors, base)
    changes = group_by_weight(tensors, weights, adapter)
    told = {**({} if record else defaults or {}), **(stated or {})}
    if initial:
        told.setdefault("method", "pissa")
    spec = spec_of(record, tensors, told, adapter)
    method = spec.get("method", "state" if all(map(is_state, tensors)) else "none")
    if methods and method not in methods:
        found = "a fully fine-tuned model" if method == "none" else method
        raise UserError(f"{adapter} is {found}, not {' or '.join(methods)}; use merge/merge.py")

    def merged(name: str, weight: Tensor, change: dict[str, Tensor]) -> Tensor:
        if "" in change:
            return replaced_weight(name, weight, change[""])
        moved, seen = filled_adapter(name, weight, change, spec).to(device), weight.to(device)
        if "quant" in spec:
            seen = quantised(seen, moved, spec["quant"], changed_base=record is None)
        return moved.merged(seen).to(weight.dtype).cpu()

    replaced = sum("" in change for change in changes.values())
    require_ours(receipt_path(output))
    with FileSet() as files:
        temporary = files.add(output)
        largest = write_changed(weights, changes, merged, (temporary, output), base)
        if check:
            check(temporary, spec)
        receipt = {
            "format": "finchtune merge 1",
            "method": method,
            "adapter_spec": spec,
            "base": {"file": Path(base).name, "sha256": record_hash(record) or sha256(base)},
            "adapter": {"file": Path(adapter).name, "sha256": sha256(adapter)},
            "output": {"file": Path(output).name, "sha256": sha256(temporary)},
            "merged": len(changes) - replaced,
            "replaced": replaced,
            "kept": len(weights) - len(changes),
            "largest_change": {name: largest[name] for name in changes},
        }
        files.add(receipt_path(output)).write_text(json_text(receipt))
    return receipt


def quantised(weight: Tensor, adapter: Adapter, kind: str, changed_base: bool) -> Tensor:
    """The weight that an adapter stood on in training, in float32.

    `changed_base`: other software takes PiSSA's start off a weight before it quantises it.
    """
    if changed_base and isinstance(adapter, ResidualLoRA):
        start = adapter.scale * adapter.init_lora_B @ adapter.init_lora_A
        return QuantisedWeight(weight.float() - start, kind).dense(torch.float32) + start
    return QuantisedWeight(weight, kind).dense(torch.float32)


def unmerge_files(
    merged: str | Path,
    adapter: str | Path,
    output: str | Path,
    base: str | Path | None = None,
    stated: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Take an adapter off merged weights again and write the base to `output`.

    Both merging and this round to the file's dtype, so the base comes back up to rounding only.
    Returns {"base_sha256", "exact", "largest_difference"}: whether the bytes are the base's by
    its hash in the adapter's JSON or the receipt (None if neither knows), and how far the
    numbers are from those of the file `base`, if that is given (else None).

    Raises UserError where the base is not to be had from the two files.
    """
    tensors, weights = read_adapter(adapter), read_base(merged)
    fitting_model(weights, merged)
    record, receipt = adapter_record(adapter), read_receipt(merged)
    known = record or ({"adapter": receipt["adapter_spec"]} if receipt else None)
    spec = spec_of(known, tensors, stated or {}, adapter)
    if "quant" in spec:
        raise UserError(f"{merged} was made of a quantised base: the weights themselves are lost")
    if receipt and receipt["adapter"]["sha256"] != sha256(adapter):
        raise UserError(f"{merged} was merged from another adapter than {adapter}")
    changes = group_by_weight(tensors, weights, adapter)
    lost = [name for name, change in changes.items() if "" in change]
    if lost:
        raise UserError(f"{adapter} replaced {lost[0]}: the base's own is in neither file")

    def unmerged(name: str, weight: Tensor, change: dict[str, Tensor]) -> Tensor:
        return filled_adapter(name, weight, change, spec).unmerged(weight).to(weight.dtype)

    with atomic_path(output) as temporary:
        write_changed(weights, changes, unmerged, (temporary, output), merged)
        wanted = record_hash(record) or receipt.get("base", {}).get("sha256")
        exact = sha256(temporary) == wanted if wanted else None
    return {
        "base_sha256": wanted,
        "exact": exact,
        "largest_difference": largest_difference(output, base) if base else None,
    }


def write_changed(
    weights: Mapping[str, Tensor],
    changes: Changes,
    change_weight: Callable[[str, Tensor, dict[str, Tensor]], Tensor],
    paths: tuple[Path, str | Path],
    source: str | Path,
) -> dict[str, float]:
    """Write `weights`, read from `source`, with `changes` made; returns each one's largest change.

    `paths`: where to, and the name that it gets, whose ending says in which form.

    Raises UserError for a tensor that holds, or would hold, NaN or infinity.
    """
    largest = {}

    @torch.no_grad()
    def tensor_of(name: str) -> Tensor:
        old, change = weights[name], changes.get(name)
        new = old if change is None else change_weight(name, old, change)
        largest[name] = largest_gap(new, old)
        if not largest[name] < float("inf"):
            check_finite({name: old}, source)
            raise UserError(f"{name} would hold NaN or infinity; nothing is written")
        return new

    path, name = paths
    if Path(name).suffix == ".safetensors":
        write_safetensors(LazyTensors(layout_of(weights), tensor_of), path)
    else:
        write_pth(weights, map(tensor_of, weights), path)
    return largest


def largest_gap(new: Tensor, old: Tensor) -> float:
    """The largest |new - old|, in float32; NaN or infinity if `new` holds them."""
    pairs = zip(new.flatten().split(CHUNK), old.flatten().split(CHUNK), strict=True)
    gaps = [(a.float() - b.float()).abs().max() for a, b in pairs if len(a)]
    return float(torch.stack(gaps).max()) if gaps else 0.0


def largest_difference(path: str | Path, other: str | Path) -> float:
    """The largest difference between the tensors of two files of one model."""
    mine, theirs = read_base(path), read_base(other)
    if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in theirs.items()}:
        raise UserError(f"{other} holds other tensors than {path}; it is not its base")
    return max(largest_gap(mine[name], theirs[name]) for name in mine)


def receipt_path(output: str | Path) -> Path:
    """Where the receipt of a merged file lies."""
    return Path(output).with_suffix(".merge.json")


def read_receipt(merged: str | Path) -> dict[str, Any]:
    """The receipt beside a merged file; {} if there is none. Raises UserError if it is of
    another file.
    """
    path = receipt_path(merged)
    if not path.exists():
        return {}
    receipt = read_json(path)
    try:
        output, _ = receipt["output"]["sha256"], receipt["adapter"]["sha256"]
        sound = isinstance(receipt["adapter_spec"], dict) and isinstance(receipt["base"], dict)
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is no receipt of a merge; take it away if it belongs elsewhere")
    if output != sha256(merged):
        raise UserError(f"{merged} is not the file that {receipt_path(merged)} tells of")
    return receipt


def is_state(name: str) -> bool:
    """Whether a tensor is a block's initial state."""
    return name.endswith(INITIAL_STATE)


def with_initial_states(
    weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], base: str | Path
) -> Mapping[str, Tensor]:
    """A base's tensors and, where `tensors` hold initial states that it lacks, zeros as such.

    Raises UserError for states that no block of the base has, and for missing ones.
    """
    added = {name for name in tensors if is_state(name)} - set(weights)
    if not added:
        return weights
    layout = layout_of(weights)
    sizes = sizes_of(layout)
    shape = (sizes.n_head, sizes.head_size, sizes.head_size)
    expected = {f"blocks.{i}{INITIAL_STATE}": shape for i in range(sizes.n_layer)}
    check_shapes({name: tuple(tensors[name].shape) for name in added}, expected, f"state of {base}")
    zero = torch.zeros(shape, dtype=layout["emb.weight"].dtype)
    return LazyTensors(
        {**layout, **dict.fromkeys(expected, zero)},
        lambda name: zero if name in expected else weights[name],
    )


def record_hash(record: dict[str, Any] | None) -> str | None:
    """The base's sha256 in an adapter's JSON."""
    return record.get("base", {}).get("sha256") if record else None


def group_by_weight(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], adapter: str | Path
) -> dict[str, dict[str, Tensor]]:
    """Sort an adapter's tensors by the base tensor that they change."""
    changes: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, own = key.rpartition(".")
        name, part = (key, "") if key in weights else (f"{layer}.weight", own)
        if name not in weights:
            raise UserError(f"{adapter}: {key} belongs to no tensor of the base; wrong base model?")
        changes.setdefault(name, {})[part] = tensor
    return changes


def replaced_weight(name: str, weight: Tensor, trained: Tensor) -> Tensor:
    """A tensor that was trained itself, in the dtype of the one that it replaces."""
    if trained.shape != weight.shape:
        raise UserError(
            f"{name} is {list(trained.shape)} in the adapter and {list(weight.shape)} in the base"
        )
    return trained.to(weight.dtype)


def filled_adapter(
    name: str, weight: Tensor, change: dict[str, Tensor], spec: dict[str, Any]
) -> Adapter:
    """The adapter of one base weight (out, in), with the tensors of its file, in float32."""
    method = get_method(spec["method"])
    known = hyperparameters_of(method)
    hyperparameters = {key: value for key, value in spec.items() if key in known}
    try:
        with torch.device("meta"):
            adapter = method(weight.shape[1], weight.shape[0], **hyperparameters)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    shapes = {part: list(tensor.shape) for part, tensor in adapter.state_dict().items()}
    found = {part: list(tensor.shape) for part, tensor in change.items()}
    if shapes != found:
        raise UserError(f"{name}: the adapter holds {found}, {spec['method']} needs {shapes}")
    adapter.load_state_dict({part: t.float() for part, t in change.items()}, assign=True)
    return adapter
