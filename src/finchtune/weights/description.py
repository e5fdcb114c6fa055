"""What a file or folder of weights is, in words."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finchtune.errors import UserError
from finchtune.files import read_json
from finchtune.models import generation_of, sizes_of
from finchtune.weights import exporting, merging
from finchtune.weights.adapter_files import adapter_record, detect_spec, read_adapter
from finchtune.weights.forms import DTYPES, FORMS, adapter_form_of, form_of
from finchtune.weights.hashing import weights_sha256
from finchtune.weights.lazy import layout_of
from finchtune.weights.tensors import unwrapped

BASE_COMMANDS = "train --load_model, merge --base_model, generate, evaluate, export --model"
ADAPTER_COMMANDS = "train --peft_load, merge, generate and export --peft_checkpoint, convert"


def describe(path: Path, hashed: bool = True) -> dict[str, str]:
    """Property -> what it is, in the order in which to show them.

    Raises UserError for what is neither weights nor an adapter, and for damaged files.
    """
    found = describe_adapter(path) or describe_model(path)
    for kind, place in (("merged", merging.receipt_path), ("exported", exporting.receipt_path)):
        if place(path).is_file():
            found |= told_by(read_json(place(path)), kind)
    if hashed:
        found["sha256"] = weights_sha256(path)
    return found


def describe_model(path: Path) -> dict[str, str]:
    """A base model: its form and its sizes."""
    form = form_of(path)
    assert form.read is not None
    layout = layout_of(unwrapped(form.read(path)))
    found = {"what": f"a model, as {form.title}"}
    try:
        sizes = sizes_of(layout)
        found["generation"] = generation_of(layout).name
        found["sizes"] = ", ".join(f"{name} {value}" for name, value in vars(sizes).items())
    except UserError as error:
        found["generation"] = f"none that is known: {error}"
    return found | counts(layout) | {"taken by": BASE_COMMANDS}


def describe_adapter(path: Path) -> dict[str, str]:
    """An adapter: its method, settings and base. {} if the path is none."""
    foreign = adapter_form_of(path)
    if not foreign and not (path.is_file() and FORMS["pth"].recognise(path)):
        return {}
    tensors = read_adapter(path)
    record = adapter_record(path)
    spec = record["adapter"] if record else detect_spec(tensors)
    if not spec:
        return {}
    title = foreign.title if foreign else "a .pth"
    settings = ", ".join(f"{k} {v}" for k, v in spec.items() if k not in ("method", "targets"))
    found = {"what": f"an adapter, as {title}", "method": f"{spec['method']}: {settings}"}
    base = (record or {}).get("base")
    found["base"] = f"{base['file']} (sha256 {base['sha256'][:12]}...)" if base else "not told"
    template = (record or {}).get("template")
    if template:
        found["template"] = template["name"] if isinstance(template, dict) else str(template)
    return found | counts(tensors) | {"taken by": ADAPTER_COMMANDS}


def counts(layout: Mapping[str, Tensor]) -> dict[str, str]:
    """How many numbers, of which dtypes."""
    names = {kind: name for name, kind in DTYPES.items()}
    numbers: Counter[str] = Counter()
    for tensor in layout.values():
        numbers[names.get(tensor.dtype, str(tensor.dtype))] += tensor.numel()
    shown = ", ".join(f"{name} {count:,}" for name, count in numbers.most_common())
    return {"tensors": str(len(layout)), "numbers": shown}


def told_by(receipt: Mapping[str, Any], kind: str) -> dict[str, str]:
    """What a receipt beside the file says of where it comes from."""
    sources = [f"{part} {receipt[part]['file']} (sha256 {receipt[part]['sha256'][:12]}...)"
               for part in ("model", "base", "adapter") if part in receipt]  # fmt: skip
    return {kind: f"from {' and '.join(sources)}"}
