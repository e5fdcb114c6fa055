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
from finchtune.errors import UserError
from finchtune.files import atomic_path, read_json, sha256, write_json
from finchtune.models import INITIAL_STATE, sizes_of
from finchtune.weights.adapter_files import adapter_record, check_base, detect_spec, read_adapter
from finchtune.weights.base import read_base
from finchtune.weights.lazy import LazyTensors, layout_of
from finchtune.weights.pth import write_pth
from finchtune.weights.tensors import check_shapes

CHUNK = 2**18  # elements compared at a time

Changes = Mapping[str, dict[str, Tensor]]
"""Base name -> what changes it: {adapter tensor name: tensor}, or {"": the new weight}."""


def merge_files(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    methods: Collection[str] | None = None,
    alpha: float | None = None,
    initial: str | Path | None = None,
    device: str = "cpu",
    check: Callable[[Path, dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Merge an adapter file into a base file and write `output` in the base's dtype and key order.

    The JSON beside the adapter says how; files of other software have none, their method is
    read off the tensors, LoRA's `alpha` must be given, and `initial` is PiSSA's second file.
    `methods` restricts what is accepted. Weights are computed on `device`. `check(path, spec)` is
    called with the written file before it gets its name; what it raises undoes everything.

    Returns, and writes beside `output` as .merge.json, a receipt: the sha256 of base, adapter and
    output, the method, the largest change of each tensor, and counts of the tensors merged,
    replaced and kept.

    Raises UserError for a wrong base, tensors left over, or NaN or infinity in the result;
    `output` is then not written.
    """
    record = adapter_record(adapter)
    if record:
        check_base(record, base, adapter)
    tensors = read_adapter(adapter, initial)
    weights = with_initial_states(read_base(base), tensors, base)
    changes = group_by_weight(tensors, weights, adapter)
    spec = record["adapter"] if record else spec_without_record(tensors, alpha, adapter)
    method = spec.get("method", "state" if all(map(is_state, tensors)) else "none")
    if methods and method not in methods:
        found = "a fully fine-tuned model" if method == "none" else method
        raise UserError(f"{adapter} is {found}, not {' or '.join(methods)}; use merge/merge.py")

    def merged(name: str, weight: Tensor, change: dict[str, Tensor]) -> Tensor:
        if "" in change:
            return replaced_weight(name, weight, change[""])
        moved, seen = filled_adapter(name, weight, change, spec).to(device), weight.to(device)
        if "quant" in spec:
            seen = QuantisedWeight(seen, spec["quant"]).dense(torch.float32)
        return moved.merged(seen).to(weight.dtype).cpu()

    with atomic_path(output) as temporary:
        largest = write_changed(weights, changes, merged, temporary)
        if check:
            check(temporary, spec)
        digest = sha256(temporary)
    replaced = sum("" in change for change in changes.values())
    receipt = {
        "format": "finchtune merge 1",
        "method": method,
        "adapter_spec": spec,
        "base": {"file": Path(base).name, "sha256": record_hash(record) or sha256(base)},
        "adapter": {"file": Path(adapter).name, "sha256": sha256(adapter)},
        "output": {"file": Path(output).name, "sha256": digest},
        "merged": len(changes) - replaced,
        "replaced": replaced,
        "kept": len(weights) - len(changes),
        "largest_change": {name: largest[name] for name in changes},
    }
    write_json(receipt_path(output), receipt)
    return receipt


def unmerge_files(
    merged: str | Path, adapter: str | Path, output: str | Path, base: str | Path | None = None
) -> dict[str, Any]:
    """Take an adapter off merged weights again and write the base to `output`.

    Both merging and this round to the file's dtype, so the base comes back up to rounding only.
    Returns {"base_sha256", "exact", "largest_difference"}: whether the bytes are the base's by
    its hash in the adapter's JSON or the receipt (None if neither knows), and how far the
    numbers are from those of the file `base`, if that is given (else None).

    Raises UserError where the base is not to be had from the two files.
    """
    tensors, weights = read_adapter(adapter), read_base(merged)
    record, receipt = adapter_record(adapter), read_receipt(merged)
    spec = (record or {}).get("adapter") or receipt.get("adapter_spec") or detect_spec(tensors)
    if spec.get("method") == "lora" and "alpha" not in spec:
        raise UserError(f"neither {adapter} nor {merged} has the JSON that tells LoRA's alpha")
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
        write_changed(weights, changes, unmerged, temporary)
    wanted = record_hash(record) or receipt.get("base", {}).get("sha256")
    exact = sha256(output) == wanted if wanted else None
    return {
        "base_sha256": wanted,
        "exact": exact,
        "largest_difference": largest_difference(output, base) if base else None,
    }


def write_changed(
    weights: Mapping[str, Tensor],
    changes: Changes,
    change_weight: Callable[[str, Tensor, dict[str, Tensor]], Tensor],
    path: Path,
) -> dict[str, float]:
    """Write `weights` with `changes` made; returns the largest change of each tensor."""
    largest = {}

    @torch.no_grad()
    def tensor_of(name: str) -> Tensor:
        old, change = weights[name], changes.get(name)
        new = old if change is None else change_weight(name, old, change)
        largest[name] = largest_gap(new, old)
        if not largest[name] < float("inf"):
            raise UserError(f"{name} would hold NaN or infinity; nothing is written")
        return new

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
    if not receipt_path(merged).exists():
        return {}
    receipt = read_json(receipt_path(merged))
    if receipt["output"]["sha256"] != sha256(merged):
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
    return record["base"]["sha256"] if record else None


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


def spec_without_record(
    tensors: dict[str, Tensor], alpha: float | None, adapter: str | Path
) -> dict[str, Any]:
    """Method and hyperparameters of an adapter file that carries no JSON."""
    spec = detect_spec(tensors)
    if spec.get("method") != "lora":
        return spec
    if alpha is None:
        raise UserError(
            f"{adapter} has no JSON beside it that tells LoRA's alpha; give --lora_alpha (the one "
            "used in training), or for PiSSA the file of initial tensors as --lora_init"
        )
    return spec | {"alpha": alpha}


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
