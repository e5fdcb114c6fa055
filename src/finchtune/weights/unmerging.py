"""Merged weights - adapter -> the base, up to rounding."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune.errors import CheckpointError
from finchtune.files import atomic_path, read_json, sha256
from finchtune.weights.adapter_files import adapter_record, read_adapter, record_hash
from finchtune.weights.base import fitting_model, read_base
from finchtune.weights.changing import Changes, by_rows, changed_weights, largest_gap
from finchtune.weights.hashing import weights_sha256
from finchtune.weights.lazy import layout_of
from finchtune.weights.merging import (
    filled_adapter,
    group_by_weight,
    receipt_path,
    write_weights,
)
from finchtune.weights.stated import spec_of


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
    theirs = read_base(base) if base else None
    if theirs is not None and shapes(theirs) != shapes(weights):
        raise CheckpointError(f"{base} holds other tensors than {merged}; it is not its base")
    record, receipt = adapter_record(adapter), read_receipt(merged)
    known = record or ({"adapter": receipt["adapter_spec"]} if receipt else None)
    spec = spec_of(known, tensors, stated or {}, adapter)
    changes = group_by_weight(tensors, weights, adapter)
    require_undoable(spec, changes, receipt, merged, adapter)

    def unmerged(name: str, weight: Tensor, change: dict[str, Tensor]) -> Iterator[Tensor]:
        adapter = filled_adapter(name, weight, change, spec)
        return by_rows(lambda part, W: part.unmerged(W), adapter, weight, weight.dtype)

    with atomic_path(output) as temporary:
        changed, _ = changed_weights(weights, changes, unmerged, merged)
        digest = write_weights(changed, temporary, output)
        # Before the file gets its name, since reading the base may fail.
        difference = None if theirs is None else largest_difference(read_base(temporary), theirs)
    wanted = record_hash(record) or receipt.get("base", {}).get("sha256")
    exact = digest == wanted if wanted else None
    return {"base_sha256": wanted, "exact": exact, "largest_difference": difference}


def require_undoable(
    spec: Mapping[str, Any],
    changes: Changes,
    receipt: Mapping[str, Any],
    merged: str | Path,
    adapter: str | Path,
) -> None:
    """Raise UserError where the base is not to be had from the merged weights and the adapter."""
    if "quant" in spec:
        raise CheckpointError(
            f"{merged} was made of a quantised base: the weights themselves are lost"
        )
    if receipt and receipt["adapter"]["sha256"] != weights_sha256(adapter):
        raise CheckpointError(f"{merged} was merged from another adapter than {adapter}")
    lost = [name for name, change in changes.items() if "" in change]
    if lost:
        raise CheckpointError(f"{adapter} replaced {lost[0]}: the base's own is in neither file")


def shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of each tensor."""
    return {name: tensor.shape for name, tensor in layout_of(weights).items()}


def largest_difference(weights: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """The largest difference between the tensors of two models of the same shapes."""
    return max(largest_gap(weights[name], others[name]) for name in weights)


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
        raise CheckpointError(
            f"{path} is no receipt of a merge; take it away if it belongs elsewhere"
        )
    if output != sha256(merged):
        raise CheckpointError(f"{merged} is not the file that {receipt_path(merged)} tells of")
    return receipt
