"""--lora_parts: where adapters sit, and what is trained beside them, in one list."""

from finchtune.errors import UserError

ADAPTED = {"att", "ffn"}  # adapters sit on the linears of both
TRAINED = ("time", "ln", "emb", "head")


def parts_of(flag: str, text: str) -> list[str]:
    """`att,ffn,time,ln` -> the parts that are trained beside the adapters: time, ln.

    Raises UserError for unknown parts, and unless adapters are wanted on att and ffn both.
    """
    words = {word.strip() for word in str(text).split(",")} - {""}
    unknown = sorted(words - ADAPTED - set(TRAINED))
    if unknown:
        known = ", ".join((*sorted(ADAPTED), *TRAINED))
        raise UserError(f"--{flag}: unknown part {unknown[0]!r}; known: {known}")
    if not words >= ADAPTED:
        raise UserError(
            f"--{flag} {text}: adapters sit on att and ffn together; name both, or drop the flag "
            "and give what is trained beside them as --train_parts"
        )
    return [part for part in TRAINED if part in words]
