"""A model for writing text, from a base file and perhaps an adapter file, which stays unmerged."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finchtune.errors import UserError
from finchtune.models import LanguageModel
from finchtune.weights.adapter_files import (
    adapted_model,
    adapter_record,
    check_base,
    read_adapter,
)
from finchtune.weights.base import load_model
from finchtune.weights.stated import spec_of


def writing_model(
    base: str | Path,
    adapter: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    stated: Mapping[str, Any] | None = None,
    initial: str | Path | None = None,
) -> LanguageModel:
    """The model in evaluation mode, its base quantised if the adapter was trained so.

    `dtype` defaults to float32 on a CPU, elsewhere to the base file's own. `stated` says what an
    adapter without a record does not, and `initial` is PiSSA's second file. Raises UserError for
    files that are none or do not belong together, and for a device that is not there.
    """
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UserError("`device` cuda: torch finds no GPU here; give `device` cpu")
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    if adapter is None:
        return load_model(base, dtype, device).eval()
    record, tensors = adapter_record(adapter), read_adapter(adapter, initial)
    if record:
        check_base(record, base, adapter)
    spec = spec_of(record, tensors, stated or {}, adapter)
    model = adapted_model(base, tensors, spec)
    return model.to(device=device, dtype=dtype or model.emb.weight.dtype)


def share_weights(model: LanguageModel, base: LanguageModel) -> None:
    """Put the base's parameters in the place of equal ones of an adapted model of it."""
    shared = dict(base.named_parameters())
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            own = shared.get(f"{path}.{name}" if path else name)
            if own is not None and own.dtype == parameter.dtype and torch.equal(own, parameter):
                setattr(module, name, own)
