"""RWKV-PEFT's merge command lines, of 2024 with their arguments by position, as ours."""

from collections.abc import Collection
from itertools import pairwise

POSITIONS = {
    "lora": ("--lora_alpha", "--base_model", "--lora_checkpoint", "--output"),
    "pissa": ("--base_model", "--lora_init", "--lora_checkpoint", "--output"),
}
"""Method of a script -> what its arguments without names are, in order."""
GPU = "--use-gpu"
RENAMED = {"--type": "--method"}
VALUES = {("--quant", "4bit"): "fp4", ("--method", "disha"): "bone", ("--method", "miss"): "bone"}
"""(flag, its value there) -> the value here. bitsandbytes' 4bit is fp4 unless told otherwise."""


def our_arguments(arguments: list[str], methods: Collection[str] | None) -> list[str]:
    """A command line of one of RWKV-PEFT's merge scripts -> one of ours; others as they are.

    `methods`: those that the script merges.
    """
    words = [word for word in arguments if word != GPU]
    method = next(iter(methods or ()), "")
    names = POSITIONS.get(method, ())
    if len(words) == len(names) and not any(word.startswith("--") for word in words):
        words = [word for pair in zip(names, words, strict=True) for word in pair]
        return words + (["--device", "cuda"] if GPU in arguments else [])
    words = [RENAMED.get(word, word) for word in arguments]
    given = dict(pairwise(words))
    for flag in ("--quant", "--method", "--lora_init"):
        if flag in given:
            i = words.index(flag)
            words[i + 1] = VALUES.get((flag, words[i + 1]), words[i + 1])
    # There the file of initial tensors is looked at for PiSSA only, and "none" is no file.
    if "--lora_init" in given and (
        given.get("--method") == "lora" or given["--lora_init"] == "none"
    ):
        i = words.index("--lora_init")
        del words[i : i + 2]
    return words
