"""--lora_parts: where adapters sit, and what is trained beside them, in one list."""

from finchtune.errors import UserError

ADAPTED = {"att", "ffn"}
TRAINED = ("time", "ln", "emb", "head")


def parts_of(flag: str, text: str) -> dict[str, list[str]]:
    """`att,time,ln` -> our flags: `target` att, and `train_parts` time ln beside the adapters.

    Raises UserError for unknown parts, and where neither att nor ffn is named.
    """
    words = {word.strip() for word in str(text).split(",")} - {""}
    unknown = sorted(words - ADAPTED - set(TRAINED))
    if unknown:
        known = ", ".join((*sorted(ADAPTED), *TRAINED))
        raise UserError(f"--{flag}: unknown part {unknown[0]!r}; known: {known}")
    if not words & ADAPTED:
        raise UserError(f"--{flag} {text}: adapters sit on att or ffn; name one, or both")
    target = [] if words >= ADAPTED else sorted(words & ADAPTED)
    return {"target": target, "train_parts": [part for part in TRAINED if part in words]}
