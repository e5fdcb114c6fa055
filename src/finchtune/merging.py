"""Adapter + base -> plain weights that every RWKV runtime loads.

No method's maths stands here: a weight is what its adapter's own `merged` says.
"""

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finchtune.adapter_files import check_base, detect_spec
from finchtune.adapters import Adapter, get_method, hyperparameters_of
from finchtune.checkpoint import adapter_record, read_adapter, read_base, write_tensors
from finchtune.errors import UserError


def merge_files(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    methods: Collection[str] | None = None,
    alpha: float | None = None,
    initial: str | Path | None = None,
) -> dict[str, int]:
    """Merge an adapter file into a base file and write `output` in the base's dtype and key order.

    The JSON beside the adapter says how; files of other software have none, their method is
    read off the tensors, LoRA's `alpha` must be given, and `initial` is PiSSA's second file.
    `methods` restricts what is accepted. Returns counts: merged, replaced and kept tensors.

    Raises UserError for a wrong base, tensors left over, or NaN or infinity in the result;
    `output` is then not written.
    """
    record = adapter_record(adapter)
    if record:
        check_base(record, base, adapter)
    tensors, weights = read_adapter(adapter, initial), read_base(base)
    changes = group_by_weight(tensors, weights, adapter)
    spec = record["adapter"] if record else spec_without_record(tensors, alpha, adapter)
    if methods and spec.get("method", "none") not in methods:
        found = spec.get("method", "a fully fine-tuned model")
        raise UserError(f"{adapter} is {found}, not {' or '.join(methods)}; use merge/merge.py")
    counts = {"merged": 0, "replaced": 0, "kept": 0}
    merged: dict[str, Tensor] = {}
    for name, weight in weights.items():
        change = changes.get(name)
        kind = "kept" if change is None else "replaced" if "" in change else "merged"
        counts[kind] += 1
        merged[name] = weight if change is None else changed_weight(name, weight, change, spec)
        if not torch.isfinite(merged[name]).all():
            raise UserError(f"{name} would hold NaN or infinity; {output} is not written")
    write_tensors(merged, output)
    return counts


def group_by_weight(
    tensors: dict[str, Tensor], weights: dict[str, Tensor], adapter: str | Path
) -> dict[str, dict[str, Tensor]]:
    """Base name -> what changes it: {adapter tensor name: tensor}, or {"": the new weight}."""
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


def changed_weight(
    name: str, weight: Tensor, change: dict[str, Tensor], spec: dict[str, Any]
) -> Tensor:
    """The weight that replaces `weight` (out, in), computed in fp32 and rounded once."""
    if "" in change:
        if change[""].shape != weight.shape:
            raise UserError(
                f"{name} is {list(change[''].shape)} in the adapter and "
                f"{list(weight.shape)} in the base"
            )
        return change[""].to(weight.dtype)
    adapter = build_adapter(name, weight, spec)
    own = adapter.state_dict()
    shapes = {part: list(tensor.shape) for part, tensor in own.items()}
    found = {part: list(tensor.shape) for part, tensor in change.items()}
    if shapes != found:
        raise UserError(f"{name}: the adapter holds {found}, {spec['method']} needs {shapes}")
    with torch.no_grad():
        for part, tensor in own.items():
            tensor.copy_(change[part])
        return adapter.merged(weight).to(weight.dtype)


def build_adapter(name: str, weight: Tensor, spec: dict[str, Any]) -> Adapter:
    """An uninitialised adapter for one base weight (out, in)."""
    method = get_method(spec["method"])
    known = hyperparameters_of(method)
    hyperparameters = {key: value for key, value in spec.items() if key in known}
    try:
        return method(weight.shape[1], weight.shape[0], **hyperparameters)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def main(methods: Collection[str] | None = None) -> None:
    """The command line of the merge scripts; `methods` is what the script accepts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base_model", required=True, help="the .pth that was fine-tuned")
    parser.add_argument(
        "--peft_checkpoint", "--lora_checkpoint", required=True, help="the adapter's .pth"
    )
    parser.add_argument("--output", required=True, help="the merged .pth to write")
    parser.add_argument("--lora_alpha", type=float, help="only for LoRA files without a JSON")
    parser.add_argument("--lora_init", help="only for PiSSA files without a JSON: initial A and B")
    given = parser.parse_args()
    inputs = {Path(p).resolve() for p in (given.base_model, given.peft_checkpoint)}
    if Path(given.output).resolve() in inputs:
        raise UserError(f"--output {given.output} would overwrite an input; choose another name")
    counts = merge_files(
        given.base_model,
        given.peft_checkpoint,
        given.output,
        methods=methods,
        alpha=given.lora_alpha,
        initial=given.lora_init,
    )
    print(f"{given.output}: " + ", ".join(f"{n} tensors {kind}" for kind, n in counts.items()))
