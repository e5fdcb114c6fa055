"""A model, or an adapter by itself, in the form that another runtime loads."""

from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from finchtune.errors import CheckpointError, UserError
from finchtune.files import FileSet, json_text, read_object, sha256
from finchtune.models import generation_of
from finchtune.weights.adapter_files import adapter_record, check_base, read_adapter
from finchtune.weights.base import fitting_model, read_base, read_checked
from finchtune.weights.forms import DTYPES, Form, LowRank, Settings
from finchtune.weights.hashing import hashing, weights_sha256
from finchtune.weights.lazy import layout_of
from finchtune.weights.merging import filled_adapter, group_by_weight, open_merge
from finchtune.weights.state_files import read_states
from finchtune.weights.stated import spec_of

FORMAT = "finchtune export 1"


def export_model(
    model: str | Path,
    output: str | Path,
    form: Form,
    settings: Settings,
    adapter: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a model as a file or folder `output`, with at most one tensor in memory at a time.

    An `adapter` is merged into it on the way, with the `options` of `open_merge`. Returns the
    receipt, which is also written beside `output`. Raises UserError for what the form cannot hold;
    nothing is then written.
    """
    assert form.write is not None
    keep_beside(output, form, settings, is_adapter=False)
    model_hash = hashing(model)
    with FileSet() as files, ExitStack() as opened:
        merge = None
        if adapter:
            merge = opened.enter_context(
                open_merge(model, adapter, base_hash=model_hash, **options)
            )
        weights = merge.weights if merge else read_checked(model)
        temporary = files.add(output, folder=not form.suffix)
        digest = form.write(weights, temporary, settings) or weights_sha256(temporary)
        made_of = merge.receipt() if merge else {"model": file_and_hash(model, model_hash)}
        return write_beside(files, output, form, settings, digest, made_of)


def export_adapter(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    form: Form,
    settings: Settings,
    stated: Mapping[str, Any] | None = None,
    other_base: bool = False,
) -> dict[str, Any]:
    """Write an adapter by itself, as the LoRA that adds what it adds to its base.

    Returns and writes a receipt as `export_model` does, with the alpha that runtimes are to be
    told. Raises UserError for methods that are no LoRA, and for trained tensors of the model.
    """
    assert form.write_adapter is not None
    base_hash = hashing(base)
    record, tensors = adapter_record(adapter), read_adapter(adapter)
    if record and not other_base:
        check_base(record, base, adapter, base_hash)
    spec = spec_of(record, tensors, stated or {}, adapter)
    keep_beside(output, form, settings, is_adapter=True)
    low_rank = as_low_rank(tensors, spec, layout_of(read_checked(base)), adapter)
    made_of = {"base": file_and_hash(base, base_hash), "adapter": file_and_hash(adapter)}
    told = {"method": spec["method"], "alpha": low_rank.alpha, "layers": len(low_rank.layers)}
    with FileSet() as files:
        temporary = files.add(output, folder=not form.suffix)
        digest = form.write_adapter(low_rank, temporary, settings) or weights_sha256(temporary)
        return write_beside(files, output, form, settings, digest, made_of | told)


def export_states(
    base: str | Path,
    states: str | Path,
    output: str | Path,
    form: Form,
    settings: Settings,
    other_base: bool = False,
) -> dict[str, Any]:
    """Write trained initial states by themselves; returns and writes a receipt.

    `states` may be a merged model too. Raises UserError for states of another model.
    """
    assert form.write_states is not None
    base_hash = hashing(base)
    record = adapter_record(states)
    if record and not other_base:
        check_base(record, base, states, base_hash)
    tensors = read_states(states, fitting_model(read_base(base), base))
    with FileSet() as files:
        digest = form.write_states(tensors, files.add(output), settings)
        made_of = {"base": file_and_hash(base, base_hash), "states": file_and_hash(states)}
        return write_beside(files, output, form, settings, digest, made_of)


def as_low_rank(
    tensors: Mapping[str, Tensor],
    spec: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    adapter: str | Path,
) -> LowRank:
    """An adapter's tensors as LoRA; of the base's `weights` only the shapes count."""
    if "quant" in spec:
        raise CheckpointError(
            f"{adapter} was trained on a base in {spec['quant']}, which no other runtime has; "
            "merge it, with merge/merge.py"
        )
    layers, alpha = {}, 0.0
    for name, change in group_by_weight(tensors, weights, adapter).items():
        if "" in change:
            raise CheckpointError(
                f"{adapter} holds {name}, a trained tensor of the model itself, for which LoRA "
                "has no place; merge it, with merge/merge.py"
            )
        try:
            A, B, scale = filled_adapter(name, weights[name], change, dict(spec)).low_rank()
        except UserError as error:
            raise CheckpointError(f"{adapter}: {error}") from error
        layers[name.removesuffix(".weight")] = (A, B)
        alpha = scale * len(A)
    if not layers:
        raise CheckpointError(f"{adapter} holds no adapter; give it as `model`")
    return LowRank(layers, alpha, generation_of(weights))


def chosen_dtype(form: Form, dtype: str | None, weights: Mapping[str, Tensor]) -> str:
    """`dtype` if the form has it; None keeps that of the weights, or takes the form's first."""
    if dtype is None:
        names = {kind: name for name, kind in DTYPES.items()}
        own = names.get(next(iter(layout_of(weights).values())).dtype, "")
        return own if own in form.dtypes else form.dtypes[0]
    if dtype not in form.dtypes:
        raise UserError(f"`dtype` {dtype}: {form.title} has {', '.join(form.dtypes)}")
    return dtype


def file_and_hash(path: str | Path, digest: Future[str] | None = None) -> dict[str, str]:
    """How a receipt names a file or folder; `digest` is its hash, if it is being computed."""
    return {"file": Path(path).name, "sha256": (digest or hashing(path)).result()}


def receipt_path(output: str | Path) -> Path:
    """Where the receipt of an exported file or folder lies."""
    return Path(f"{Path(output)}.export.json")  # without a slash at the end of a folder


def write_beside(
    files: FileSet,
    output: str | Path,
    form: Form,
    settings: Settings,
    digest: str,
    made_of: Mapping[str, Any],
) -> dict[str, Any]:
    """Add to the files what lies beside an output; returns the receipt.

    That is the receipt, which says what it is and what it was made of, and what the form has
    beside it besides.
    """
    receipt: dict[str, Any] = {
        "format": FORMAT,
        "form": form.name,
        "dtype": settings.dtype,
        **made_of,
        "template": settings.template.name if settings.template else None,
        "output": {"file": Path(output).name, "sha256": digest},
    }
    if form.beside:
        name, text = form.beside(Path(output), settings, "alpha" in made_of)
        written = files.add(Path(output).with_name(name))
        written.write_text(text)
        receipt["beside"] = {"file": name, "sha256": sha256(written)}
    files.add(receipt_path(output)).write_text(json_text(receipt))
    return receipt


def keep_beside(output: str | Path, form: Form, settings: Settings, is_adapter: bool) -> None:
    """Raise UserError where what is to lie beside an output is there already, and not as written.

    The receipt of an earlier export tells what was written.
    """
    if not form.beside:
        return
    path = Path(output).with_name(form.beside(Path(output), settings, is_adapter)[0])
    receipt = read_object(receipt_path(output)) if receipt_path(output).exists() else {}
    known = receipt.get("beside")
    if path.exists() and not (isinstance(known, dict) and known.get("sha256") == sha256(path)):
        raise UserError(f"{path} is there, not as we write it; move it, or choose another name")
