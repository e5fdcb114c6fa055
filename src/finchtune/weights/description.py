"""What a file or folder of weights is, in words."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finchtune.adapters import block_targets, targets_of
from finchtune.errors import CheckpointError, UserError
from finchtune.files import read_object
from finchtune.models import INITIAL_STATE, generation_of, sizes_of
from finchtune.weights import exporting, merging
from finchtune.weights.adapter_files import adapter_record, read_adapter
from finchtune.weights.forms import DTYPES, FORMS, adapter_form_of, form_of
from finchtune.weights.hashing import weights_sha256
from finchtune.weights.lazy import layout_of
from finchtune.weights.stated import adapter_tensors, possible_methods, shapes_of
from finchtune.weights.tensors import unwrapped

BASE_COMMANDS = "train --load_model, merge --base_model, generate, evaluate, export --model"
STATE_COMMANDS = "train --peft_load, merge, generate --state, export --peft_checkpoint"
ADAPTER_COMMANDS = "train --peft_load, merge, generate and export --peft_checkpoint, convert"


def describe(path: Path, hashed: bool = True) -> dict[str, str]:
    """Property -> what it is, in the order in which to show them.

    Raises UserError for what is neither weights nor an adapter, and for damaged files.
    """
    found = describe_adapter(path) or describe_model(path)
    for kind, place in (("merged", merging.receipt_path), ("exported", exporting.receipt_path)):
        if place(path).is_file():
            found |= told_by(place(path), kind)
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
    spec = record["adapter"] if record else told_by_tensors(tensors)
    title = foreign.title if foreign else "a .pth"
    if all(key.endswith(INITIAL_STATE) for key in tensors):
        found = {"what": f"trained initial states, as {title}", "base": told_base(record)}
        return found | counts(tensors) | {"taken by": STATE_COMMANDS}
    if not spec:
        return {}
    settings = ", ".join(f"{k} {v}" for k, v in spec.items() if k not in ("method", "targets"))
    whole = spec.get("targets") == block_targets([])
    places = [] if whole else targets_of(key.rpartition(".")[0] for key in tensors)
    settings += f", on {' '.join(places)}" if places else ""
    if not record:
        settings += "; no record tells the rest"
    found = {"what": f"an adapter, as {title}", "method": f"{spec['method']}: {settings}"}
    found["base"] = told_base(record)
    template = (record or {}).get("template")
    if template:
        found["template"] = template["name"] if isinstance(template, dict) else str(template)
    return found | counts(tensors) | {"taken by": ADAPTER_COMMANDS}


def told_by_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What an adapter without a record may be, and what its shapes tell; {} if it is none."""
    methods = possible_methods(tensors) if adapter_tensors(tensors) else []
    return {"method": " or ".join(methods), **shapes_of(tensors)} if methods else {}


def told_base(record: Mapping[str, Any] | None) -> str:
    """What a record says of the base."""
    base = (record or {}).get("base")
    return f"{base['file']} (sha256 {base['sha256'][:12]}...)" if base else "not told"


def counts(layout: Mapping[str, Tensor]) -> dict[str, str]:
    """How many numbers, of which dtypes."""
    names = {kind: name for name, kind in DTYPES.items()}
    numbers: Counter[str] = Counter()
    for tensor in layout.values():
        numbers[names.get(tensor.dtype, str(tensor.dtype))] += tensor.numel()
    shown = ", ".join(f"{name} {count:,}" for name, count in numbers.most_common())
    return {"tensors": str(len(layout)), "numbers": shown}


def told_by(path: Path, kind: str) -> dict[str, str]:
    """What a receipt beside a file says of where that comes from. UserError if it is none."""
    receipt = read_object(path)
    parts = {part: receipt[part] for part in ("model", "base", "adapter") if part in receipt}
    if not parts or not all(isinstance(one, dict) for one in parts.values()):
        raise CheckpointError(f"{path} is no receipt; take it away if it belongs elsewhere")
    sources = [f"{part} {one.get('file')} (sha256 {str(one.get('sha256'))[:12]}...)"
               for part, one in parts.items()]  # fmt: skip
    return {kind: f"from {' and '.join(sources)}"}
