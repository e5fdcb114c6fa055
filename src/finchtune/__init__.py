"""finchtune: fine-tuning RWKV models with Bone, Bat, LoRA and their kin.

The public names are imported when first used, so that `import finchtune` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "attach": "finchtune.adapters",
    "generate_batch": "finchtune.inference.generate",
    "merge": "finchtune.adapters",
    "load_model": "finchtune.weights.base",
    "wkv6": "finchtune.ops.wkv6",
    "wkv7": "finchtune.ops.wkv7",
}
__all__ = ["attach", "generate_batch", "load_model", "merge", "wkv6", "wkv7"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'finchtune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
