"""Folders of Hugging Face's peft. Written as LoRA alone, which is exact: see Adapter.low_rank."""

from pathlib import Path

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
    from_hf_rwkv6,
    read_peft,
    renamed,
    to_hf_rwkv6,
)

HF_PREFIX = "rwkv."


def recognise_adapter(path: Path) -> bool:
    """By adapter_config.json."""
    return path.is_dir() and (path / CONFIG).is_file()


def read_adapter(path: Path) -> FoundAdapter:
    """An adapter whose layers have our names or those of Hugging Face's RWKV-6."""
    adapter = read_peft(path)
    if any(name.startswith(HF_PREFIX) for name in adapter.tensors):
        adapter = renamed(adapter, from_hf_rwkv6)
    return FoundAdapter(*adapter)


def write_adapter(adapter: LowRank, path: Path, settings: Settings) -> None:
    """Write a folder that PeftModel.from_pretrained loads."""
    tensors, spec = adapter.found()
    dtype = DTYPES[settings.dtype]
    named = PeftAdapter({name: converted(name, t, dtype) for name, t in tensors.items()}, spec)
    fill_folder(renamed(named, to_hf_rwkv6) if settings.hf_names else named, path)


FORM = Form(
    name="peft",
    title="a folder of Hugging Face's peft",
    dtypes=tuple(DTYPES),
    recognise=lambda path: False,
    recognise_adapter=recognise_adapter,
    read_adapter=read_adapter,
    write_adapter=write_adapter,
)
