"""The tokenizer that a name or a file stands for."""

from functools import lru_cache
from pathlib import Path

from finchtune.errors import UserError
from finchtune.tokenizer.base import BYTES_VOCAB_SIZE, BytesTokenizer, Tokenizer
from finchtune.tokenizer.hugging_face import HFTokenizer
from finchtune.tokenizer.world import WORLD_VOCAB_SIZE, WorldTokenizer, read_world_vocabulary


def load_tokenizer(spec: str | None, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer named by `spec`: "world", "bytes", or the path of a vocabulary file.

    A path ending in .txt is a vocabulary in World's format, any other a tokenizer.json. With
    `spec` None the model's `vocab_size` decides: 65536 is World, 256 is bytes.
    Raises UserError where that decides nothing, or where the tokenizer does not fit the model.
    """
    if spec is None:
        spec = {WORLD_VOCAB_SIZE: "world", BYTES_VOCAB_SIZE: "bytes"}.get(vocab_size or 0)
    if spec is None:
        raise UserError(
            f"no tokenizer is known for a vocabulary of {vocab_size}; "
            "pass `tokenizer` with the path of its tokenizer.json"
        )
    tokenizer = _open_tokenizer(spec)
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"`tokenizer` {spec} has {tokenizer.vocab_size} tokens, but the model only "
            f"{vocab_size}; pass the tokenizer that the model was trained with"
        )
    return tokenizer


@lru_cache(maxsize=4)
def _open_tokenizer(spec: str) -> Tokenizer:
    if spec == "world":
        return WorldTokenizer()
    if spec == "bytes":
        return BytesTokenizer()
    if not Path(spec).is_file():
        raise UserError(
            f"`tokenizer` {spec}: no such file; give world, bytes or the path of a tokenizer.json"
        )
    if spec.endswith(".txt"):
        read_world_vocabulary(Path(spec))
        return WorldTokenizer(spec)
    return HFTokenizer(spec)
