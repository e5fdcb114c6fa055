"""PREFIX.info.json beside a prepared pair: the tokenizer and the template that made it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finchtune.data import templates
from finchtune.data.binidx import strip_extension
from finchtune.data.templates import Template
from finchtune.errors import DataError
from finchtune.files import read_json
from finchtune.tokenizer import Tokenizer

FORMAT = 1


@dataclass(frozen=True)
class Provenance:
    """What a pair of `documents` and `tokens` was made with; `template` None: with none at all."""

    tokenizer: str
    tokenizer_sha256: str
    template: Template | None
    documents: int
    tokens: int

    def record(self) -> dict[str, Any]:
        """As JSON values."""
        template = self.template.record() if self.template else None
        return {"format": FORMAT, **vars(self), "template": template}

    def check(self, prefix: str, tokenizer: Tokenizer | None, template: Template | None) -> None:
        """UserError unless the pair's tokenizer, and its template if it has one, are these."""
        if tokenizer and tokenizer.sha256 != self.tokenizer_sha256:
            raise DataError(
                f"{prefix} was prepared with `tokenizer` {self.tokenizer}, but this is "
                f"{tokenizer.name}, which differs; give that one, or prepare the data again"
            )
        if template and self.template and template != self.template:
            raise DataError(
                f"{prefix} was prepared with `template` {self.template.name}, not with this "
                f"`template` {template.name}; drop the flag, or prepare the data again"
            )


def info_path(prefix: str | Path) -> Path:
    """Where a pair's provenance is written."""
    return Path(f"{strip_extension(prefix)}.info.json")


def read_provenance(prefix: str | Path, documents: int, tokens: int) -> Provenance | None:
    """What is written beside a pair; None where nothing is, as with pairs of other software.

    UserError where it is damaged, or belongs to another pair than one of these numbers.
    """
    path = info_path(prefix)
    if not path.exists():
        return None
    content = read_json(path)
    try:
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        template = content.pop("template")
        where = f"{path}: template"
        found = Provenance(
            template=None if template is None else templates.from_record(template, where), **content
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not what prepare_data.py writes ({error}); remove it") from None
    if (found.documents, found.tokens) != (documents, tokens):
        raise DataError(
            f"{path} is about {found.documents} documents of {found.tokens} tokens, but the pair "
            f"has {documents} of {tokens}; prepare the data again, or remove that file"
        )
    return found
