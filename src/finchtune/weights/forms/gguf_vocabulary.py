"""The vocabulary and the chat template in a GGUF."""

from typing import Any

from finchtune.errors import CheckpointError
from finchtune.tokenizer import BytesTokenizer, Tokenizer, WorldTokenizer
from finchtune.weights.forms.base import Settings
from finchtune.weights.forms.templates import jinja_of

END_OF_TURN = b"\n\n"


def add_vocabulary(writer: Any, settings: Settings, vocab_size: int) -> None:
    """The tokens, each as the escaped bytes of Python's repr, and the chat template."""
    import gguf

    tokens = [token_bytes(settings.tokenizer, id) for id in range(vocab_size)]
    kinds = [gguf.TokenType.NORMAL if token else gguf.TokenType.UNUSED for token in tokens]
    texts = [repr(token)[2:-1] if token else f"[PAD{id}]" for id, token in enumerate(tokens)]
    texts[0], kinds[0] = "<s>", gguf.TokenType.CONTROL
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if END_OF_TURN in tokens:
        writer.add_eot_token_id(tokens.index(END_OF_TURN))
    if settings.template:
        writer.add_chat_template(jinja_of(settings.template))


def token_bytes(tokenizer: Tokenizer | None, id: int) -> bytes:
    """The bytes of a token, none for one that stands for no text."""
    if not isinstance(tokenizer, WorldTokenizer | BytesTokenizer):
        raise CheckpointError(
            "a GGUF of RWKV holds the World vocabulary or bytes, no other tokenizer"
        )
    return tokenizer.id_bytes(id) if 0 < id < tokenizer.vocab_size else b""
