"""The forms by name, and which one a path is of."""

import difflib
import pkgutil
import re
from importlib import import_module
from pathlib import Path

from finchtune.errors import CheckpointError
from finchtune.models import released_sizes
from finchtune.weights import forms
from finchtune.weights.forms.base import Form

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".st", ".gguf")
FOREIGN = {
    b"<!DOCTYPE": "a web page, not weights; download the file itself",
    b"<html": "a web page, not weights; download the file itself",
    b"version https://git-lfs": "a Git LFS pointer, not weights; run git lfs pull",
}
"""What files that are often taken for weights begin with."""


def find_forms() -> dict[str, Form]:
    """Every FORM of the modules beside this one."""
    names = sorted(module.name for module in pkgutil.iter_modules(forms.__path__))
    modules = [import_module(f"{forms.__name__}.{n}") for n in names if n != "registry"]
    found = [module.FORM for module in modules if hasattr(module, "FORM")]
    return {form.name: form for form in found}


FORMS = find_forms()


def get_form(name: str) -> Form:
    """A form by its name; an unknown one raises UserError."""
    if name not in FORMS:
        near = difflib.get_close_matches(name, FORMS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(FORMS)}"
        raise CheckpointError(f"no form {name!r}{hint}")
    return FORMS[name]


def form_of(path: str | Path) -> Form:
    """The form of the weights in a file or folder. Raises UserError if it is of none."""
    name, path = str(path), Path(path)
    if not path.exists():
        raise CheckpointError(f"{name}: no such file{what_is_meant(name)}")
    found = next((form for form in FORMS.values() if form.recognise(path)), None)
    if found:
        return found
    adapter = adapter_form_of(path)
    if adapter:
        raise CheckpointError(
            f"{path} is an adapter ({adapter.title}); give it as `peft_checkpoint`"
        )
    raise CheckpointError(f"{path} {what_else(path)}")


def what_is_meant(name: str) -> str:
    """What to say where no file has a name that elsewhere stands for a model."""
    if name in released_sizes():
        return "; names of released models are for `plan` 1: give the file of its weights"
    is_file_name = Path(name).suffix in SUFFIXES or Path(name).parent.exists()
    if name.startswith(("http://", "https://")) or (HUB_NAME.fullmatch(name) and not is_file_name):
        return "; nothing is downloaded here: download the weights and give their file"
    return ""


def adapter_form_of(path: str | Path) -> Form | None:
    """The form of another software's adapter; None for our own .pth, and for what is none."""
    return next((form for form in FORMS.values() if form.recognise_adapter(Path(path))), None)


def what_else(path: Path) -> str:
    """What a path is that holds no weights, for a message."""
    if path.is_dir():
        return "is a folder without weights of an RWKV"
    if not path.is_file():
        return "is neither a file nor a folder"
    with path.open("rb") as file:
        start = file.read(32).lstrip()
    for prefix, what in FOREIGN.items():
        if start.lower().startswith(prefix.lower()):
            return f"is {what}"
    return f"({path.stat().st_size:,} bytes) holds no weights in a form that is known here"
