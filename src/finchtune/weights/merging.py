"""Adapter + base -> plain weights that every RWKV runtime loads, and back again.

No method's maths stands here: a weight is what its adapter's own `merged` or `unmerged` says.
Tensors are read, changed and written one at a time, while threads hash what is read and written.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from finchtune.adapters import Adapter, QuantisedWeight, get_method, hyperparameters_of
from finchtune.adapters.residual import ResidualLoRA
from finchtune.errors import CheckpointError, UserError
from finchtune.files import FileSet, json_text
from finchtune.models import INITIAL_STATE, sizes_of
from finchtune.weights.adapter_files import (
    adapter_record,
    check_base,
    read_adapter,
    require_ours,
)
from finchtune.weights.base import fitting_model, read_base
from finchtune.weights.changing import by_rows, changed_weights
from finchtune.weights.forms.safetensors import write_safetensors
from finchtune.weights.hashing import hashing, weights_sha256
from finchtune.weights.lazy import LazyTensors, layout_of
from finchtune.weights.pth import write_pth
from finchtune.weights.stated import spec_of
from finchtune.weights.tensors import check_shapes

HASHING_THREADS = 2  # one for what is read, one for what is written


class Merge(NamedTuple):
    """An adapter merged into a base, tensor by tensor as `weights` are asked for."""

    weights: LazyTensors
    spec: dict[str, Any]
    told: dict[str, Any]
    """What a receipt says of it."""
    base: Path
    base_hash: Future[str]
    largest: dict[str, float]
    """The largest change of each tensor that was asked for."""
    changed: Collection[str]

    def receipt(self) -> dict[str, Any]:
        """The receipt's part that does not depend on what is written."""
        base = {"file": self.base.name, "sha256": self.base_hash.result()}
        largest = {name: self.largest[name] for name in self.changed}
        return {"base": base, **self.told, "largest_change": largest}


@contextmanager
def open_merge(
    base: str | Path,
    adapter: str | Path,
    *,
    other_base: bool = False,
    base_hash: Future[str] | None = None,
    **options: Any,
) -> Iterator[Merge]:
    """An adapter merged into a base, in the base's dtypes and key order; as in `merge_files`.

    The base is hashed while the block runs, or since earlier, by `base_hash`. If it is not the
    adapter's own, the block ends with the UserError that says so, whatever else was found wrong.
    """
    base_hash = base_hash or hashing(base)
    record = adapter_record(adapter)
    known = {} if other_base else record or {}
    try:
        merge = prepare_merge(base, adapter, record, base_hash, **options)
        if other_base:
            merge.told["trained_on"] = (record or {}).get("base")
        yield merge
    except UserError:
        check_base(known, base, adapter, base_hash)
        raise
    check_base(known, base, adapter, base_hash)


def prepare_merge(
    base: str | Path,
    adapter: str | Path,
    record: dict[str, Any] | None,
    base_hash: Future[str],
    *,
    methods: Collection[str] | None = None,
    stated: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    initial: str | Path | None = None,
    device: str = "cpu",
) -> Merge:
    """The merge that an adapter file, with its `record`, asks for; the base is not checked."""
    tensors, weights = read_adapter(adapter, initial), read_base(base)
    fitting_model(weights, base)
    weights = with_initial_states(weights, tensors, base)
    changes = group_by_weight(tensors, weights, adapter)
    if initial:
        defaults = {**(defaults or {}), "method": "pissa"}
    spec = spec_of(record, tensors, stated or {}, adapter, defaults)
    method = spec.get("method", "state" if all(map(is_state, tensors)) else "none")
    if methods and method not in methods:
        found = "a fully fine-tuned model" if method == "none" else method
        raise CheckpointError(
            f"{adapter} is {found}, not {' or '.join(methods)}; use merge/merge.py"
        )

    def merged(name: str, weight: Tensor, change: dict[str, Tensor]) -> Iterator[Tensor]:
        if "" in change:
            return iter([replaced_weight(name, weight, change[""])])
        moved, seen = filled_adapter(name, weight, change, spec).to(device), weight
        if "quant" in spec:
            seen = quantised(seen.to(device), moved, spec["quant"], changed_base=record is None)
        return by_rows(lambda part, W: part.merged(W.to(device)), moved, seen, weight.dtype)

    replaced = sum("" in change for change in changes.values())
    digest = (record or {}).get("sha256") or weights_sha256(adapter)
    told = {
        "method": method,
        "adapter_spec": spec,
        "adapter": {"file": Path(adapter).name, "sha256": digest},
        "merged": len(changes) - replaced,
        "replaced": replaced,
        "kept": len(weights) - len(changes),
    }
    changed, largest = changed_weights(weights, changes, merged, base)
    return Merge(changed, spec, told, Path(base), base_hash, largest, changes.keys())


def merge_files(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    check: Callable[[Path, dict[str, Any]], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Merge an adapter file into a base file and write `output` in the base's dtype and key order.

    The adapter's record says how. Files of other software have none: their method and sizes are
    read off the tensors, what these do not tell has to be `stated` where it has no `defaults`, and
    `initial` is PiSSA's second file.
    `methods` restricts what is accepted. Weights are computed on `device`. With `other_base` the
    base need not be the one that the adapter was trained on, which the receipt then tells as
    `trained_on`. `check(path, spec)` is called with the written file before it gets its name; what
    it raises undoes everything.

    Returns, and writes beside `output` as .merge.json, a receipt: the sha256 of base, adapter and
    output, the method, the largest change of each tensor, and counts of the tensors merged,
    replaced and kept.

    Raises UserError for a wrong base, one that would not load, tensors left over, or NaN or
    infinity; `output` is then not written.
    """
    require_ours(receipt_path(output))
    with FileSet() as files, open_merge(base, adapter, **options) as merge:
        temporary = files.add(output)
        digest = write_weights(merge.weights, temporary, output)
        if check:
            check(temporary, merge.spec)
        output_told = {"file": Path(output).name, "sha256": digest}
        receipt = {"format": "finchtune merge 1", **merge.receipt(), "output": output_told}
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


def write_weights(weights: LazyTensors, path: Path, name: str | Path) -> str:
    """Write to `path` in the form that the ending of `name` asks for; returns the sha256."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads - HASHING_THREADS))
    try:
        if Path(name).suffix == ".safetensors":
            return write_safetensors(weights, path)
        return write_pth(weights.layout, map(weights.pieces, weights), path)
    finally:
        torch.set_num_threads(threads)


def receipt_path(output: str | Path) -> Path:
    """Where the receipt of a merged file lies."""
    output = Path(output)
    if output.suffix == ".pth":
        return output.with_suffix(".merge.json")
    return output.with_name(f"{output.name}.merge.json")  # one of each form may lie there


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


def group_by_weight(
    tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], adapter: str | Path
) -> dict[str, dict[str, Tensor]]:
    """Sort an adapter's tensors by the base tensor that they change."""
    changes: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, own = key.rpartition(".")
        name, part = (key, "") if key in weights else (f"{layer}.weight", own)
        if name not in weights:
            raise CheckpointError(
                f"{adapter}: {key} belongs to no tensor of the base; wrong base model?"
            )
        changes.setdefault(name, {})[part] = tensor
    return changes


def replaced_weight(name: str, weight: Tensor, trained: Tensor) -> Tensor:
    """A tensor that was trained itself, in the dtype of the one that it replaces."""
    if trained.shape != weight.shape:
        raise CheckpointError(
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
        raise CheckpointError(f"{name}: {error}") from error
    shapes = {part: list(tensor.shape) for part, tensor in adapter.state_dict().items()}
    found = {part: list(tensor.shape) for part, tensor in change.items()}
    if shapes != found:
        raise CheckpointError(f"{name}: the adapter holds {found}, {spec['method']} needs {shapes}")
    adapter.load_state_dict({part: t.float() for part, t in change.items()}, assign=True)
    return adapter
