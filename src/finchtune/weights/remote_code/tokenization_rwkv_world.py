"""The World vocabulary of RWKV in transformers: greedy longest match over strings of bytes.

Lies beside weights that finchtune exported. Loaded by
AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True).
"""

import ast
import os
import shutil
from typing import Any

from transformers import PreTrainedTokenizer

VOCABULARY = "rwkv_vocab_v20230424.txt"
END = "<|rwkv_tokenizer_end_of_text|>"
"""Token 0, which ends a document and stands for no bytes."""


class RwkvWorldTokenizer(PreTrainedTokenizer):
    """Tokens are bytes, shown as strings of the characters U+0000 to U+00FF."""

    vocab_files_names = {"vocab_file": VOCABULARY}
    model_input_names = ["input_ids", "attention_mask"]

    def __init__(self, vocab_file: str, **settings: Any) -> None:
        self.vocab_file = vocab_file
        self.ids = read_vocabulary(vocab_file)
        self.tokens = {id: token for token, id in self.ids.items()}
        lengths: dict[bytes, set[int]] = {}
        for token in self.ids:
            lengths.setdefault(token[:2], set()).add(len(token))
        self.lengths = {start: sorted(found, reverse=True) for start, found in lengths.items()}
        defaults = {"bos_token": END, "eos_token": END, "pad_token": END, "unk_token": END}
        super().__init__(**(defaults | settings))

    @property
    def vocab_size(self) -> int:
        """One above the largest id: the model has 65,536."""
        return max(self.tokens) + 1

    def get_vocab(self) -> dict[str, int]:
        """Token -> id."""
        return {END: 0} | {shown(token): id for token, id in self.ids.items()}

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        raw, begin, found = text.encode(), 0, []
        while begin < len(raw):
            lengths = (*self.lengths.get(raw[begin : begin + 2], ()), 1)
            size = next(n for n in lengths if n == 1 or raw[begin : begin + n] in self.ids)
            found.append(shown(raw[begin : begin + size]))
            begin += size
        return found

    def _convert_token_to_id(self, token: str) -> int:
        return 0 if token == END else self.ids.get(token.encode("latin-1"), 0)

    def _convert_id_to_token(self, index: int) -> str:
        return END if index == 0 else shown(self.tokens.get(index, b""))

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text; bytes that are no UTF-8 become U+FFFD."""
        return "".join(tokens).encode("latin-1").decode("utf-8", errors="replace")

    def save_vocabulary(
        self, save_directory: str, filename_prefix: str | None = None
    ) -> tuple[str]:
        """Copy the vocabulary's file."""
        name = f"{filename_prefix}-{VOCABULARY}" if filename_prefix else VOCABULARY
        path = os.path.join(save_directory, name)
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)


def shown(token: bytes) -> str:
    """A token as the string that transformers has of it."""
    return token.decode("latin-1")


def read_vocabulary(path: str) -> dict[bytes, int]:
    """Bytes -> id. A line is: id, Python literal of str or bytes, length in bytes."""
    found = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            id, rest = line.split(" ", 1)
            token = ast.literal_eval(rest.rsplit(" ", 1)[0])
            found[token.encode() if isinstance(token, str) else token] = int(id)
    return found
