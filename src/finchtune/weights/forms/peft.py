"""Folders of Hugging Face's peft. Written as LoRA alone, which is exact: see Adapter.low_rank."""

from contextlib import suppress
from pathlib import Path

from finchtune.errors import UserError
from finchtune.weights.forms.base import (
    DTYPES,
    Form,
    FoundAdapter,
    LowRank,
    Settings,
    converted,
)
from finchtune.weights.peft_form import (
    CONFIG,
    PeftAdapter,
    fill_folder,
    namings,
    read_peft,
    renamed,
)


def recognise_adapter(path: Path) -> bool:
    """By adapter_config.json."""
    return path.is_dir() and (path / CONFIG).is_file()


def read_adapter(path: Path) -> FoundAdapter:
    """An adapter whose layers have our names, or those of another form."""
    adapter = read_peft(path)
    if any(name.startswith("blocks.") for name in adapter.tensors):
        return FoundAdapter(*adapter)
    for naming in namings().values():
        with suppress(UserError):
            return FoundAdapter(*renamed(adapter, naming.ours))
    return FoundAdapter(*adapter)


def write_adapter(adapter: LowRank, path: Path, settings: Settings) -> None:
    """Write a folder that PeftModel.from_pretrained loads."""
    tensors, spec = adapter.found()
    dtype = DTYPES[settings.dtype]
    named = PeftAdapter({name: converted(name, t, dtype) for name, t in tensors.items()}, spec)
    naming = namings().get(settings.layer_names)
    fill_folder(renamed(named, naming.theirs) if naming else named, path)


FORM = Form(
    name="peft",
    title="a folder of Hugging Face's peft",
    dtypes=tuple(DTYPES),
    recognise=lambda path: False,
    recognise_adapter=recognise_adapter,
    read_adapter=read_adapter,
    write_adapter=write_adapter,
)
