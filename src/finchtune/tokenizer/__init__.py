"""Text <-> token ids: the World vocabulary, raw bytes, or any Hugging Face tokenizer.json."""

from finchtune.tokenizer.base import END_OF_DOCUMENT, BytesTokenizer, Tokenizer
from finchtune.tokenizer.load import load_tokenizer
from finchtune.tokenizer.stream import Decoder
from finchtune.tokenizer.world import WorldTokenizer

__all__ = [
    "END_OF_DOCUMENT",
    "BytesTokenizer",
    "Decoder",
    "Tokenizer",
    "WorldTokenizer",
    "load_tokenizer",
]
