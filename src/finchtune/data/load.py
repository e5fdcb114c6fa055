"""`load_data`: a data file and its flags -> the batches of every step."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from finchtune.data import templates
from finchtune.data.binidx import exists, file_paths, require_file, strip_extension
from finchtune.data.cache import read_cached
from finchtune.data.dataset import Data
from finchtune.data.documents import Documents, held_out, read_binidx, read_records
from finchtune.data.inputs import find_inputs
from finchtune.data.mixing import MixedRows, SourceRows, parse_sources
from finchtune.data.provenance import read_provenance
from finchtune.data.render import Layout
from finchtune.data.sampling import DocumentRows, PackedRows, Rows, WindowRows
from finchtune.data.speakers import parse_pairs
from finchtune.data.templates import Template
from finchtune.errors import DataError, UserError
from finchtune.tokenizer import Tokenizer

DATA_TYPES = ("binidx", "jsonl", "sft")
DATALOADS = ("pad", "get", "pack", "only")
LOSS_MASKS = ("none", "pad", "qa")


def load_data(
    data_file: str,
    data_type: str,
    dataload: str,
    ctx_len: int,
    loss_mask: str = "pad",
    sft_field: Sequence[str] | None = None,
    tokenizer: Tokenizer | None = None,
    vocab_size: int = 65536,
    seed: int = 42,
    on_bad: str = "fail",
    val_split: float = 0.0,
    cache_dir: str | Path | None = None,
    template: str = "",
    speakers: Sequence[str] = (),
    whole: bool = False,
) -> Data:
    """Read a data set and prepare its rows.

    `data_file` is a prefix for `binidx`; a file, glob or folder for `jsonl` (text, messages or
    conversations) and `sft` (the fields `sft_field`: question answer, or instruction input
    output). Several are joined by commas, with weights as `a:0.7,b:0.3`. `loss_mask` qa trains on
    answers and their end alone; none and pad on every token. `val_split` is the share of the
    documents to hold out, chosen by their hash: they are the result's `validation`. `cache_dir`
    keeps what was tokenised for the next time, in a file that all processes share; the call is
    then a collective one. `template` is a name or file (data.templates), `speakers` the pairs of
    plain text (data.speakers); a prepared pair brings its own, and refuses another.
    `whole`: documents longer than ctx_len are not cut.
    Raises UserError for flags that do not fit together, bad data, and data without a target.
    """
    _check_choices(data_type=data_type, dataload=dataload, loss_mask=loss_mask)
    _check_numbers(ctx_len, val_split, dataload)
    layout = _layout(data_type, sft_field, loss_mask, template, speakers)
    _check_tokenizer(tokenizer, data_type, vocab_size)
    paths, weights = zip(*parse_sources(data_file), strict=True)
    if data_type == "binidx":
        sets = [_read_pair(p, vocab_size, loss_mask, tokenizer, layout.template) for p in paths]
    else:
        assert tokenizer is not None
        sets = [_read_text(path, layout, tokenizer, on_bad, cache_dir) for path in paths]
    if loss_mask != "qa":
        sets = [replace(documents, trained=None) for documents in sets]
    trained, held = zip(*(_split(documents, val_split) for documents in sets), strict=True)
    common = _common_template(data_file, sets, layout.template)

    def data(chosen: Sequence[np.ndarray]) -> Data:
        rows = [
            _rows(documents, numbers, dataload, ctx_len, seed, whole)
            for documents, numbers in zip(sets, chosen, strict=True)
        ]
        mixed: Rows = MixedRows(rows, list(weights), seed) if len(rows) > 1 else rows[0]
        _require_targets(mixed, data_file, loss_mask, ctx_len)
        return Data(mixed, dataload, max(part.ctx_len for part in rows), sets, common)

    result = data(trained)
    result.validation = data(held) if val_split else None
    return result


def _require_targets(rows: Rows, data_file: str, loss_mask: str, ctx_len: int) -> None:
    if not rows.counts().targets:
        raise DataError(
            f"{data_file}: `loss_mask` {loss_mask} leaves no token to train on within `ctx_len` "
            f"{ctx_len}; raise `ctx_len` or choose another mask"
        )


def _check_choices(data_type: str, dataload: str, loss_mask: str) -> None:
    choices = [
        ("data_type", data_type, DATA_TYPES),
        ("dataload", dataload, DATALOADS),
        ("loss_mask", loss_mask, LOSS_MASKS),
    ]
    for flag, value, known in choices:
        if value not in known:
            raise UserError(f"`{flag}` {value}: choose one of {', '.join(known)}")


def _check_numbers(ctx_len: int, val_split: float, dataload: str) -> None:
    if ctx_len < 1:
        raise UserError(f"`ctx_len` {ctx_len} must be at least 1")
    if not 0 <= val_split < 1:
        raise UserError(f"`val_split` {val_split} must be at least 0 and below 1")
    if val_split and dataload == "get":
        raise UserError(
            "`dataload` get reads across documents, so it cannot hold some out; split the data "
            "with scripts/prepare_data.py `val_split`"
        )


def _layout(
    data_type: str,
    sft_field: Sequence[str] | None,
    loss_mask: str,
    template: str,
    speakers: Sequence[str],
) -> Layout:
    if data_type == "sft" and (sft_field is None or len(sft_field) not in (2, 3)):
        raise UserError(
            "`data_type` sft needs `sft_field` with two names (question answer) or three "
            f"(instruction input output), not {' '.join(sft_field or []) or 'none'}"
        )
    if data_type != "sft" and sft_field:
        raise UserError(f"`sft_field` belongs to `data_type` sft, not {data_type}")
    if speakers and (data_type != "jsonl" or loss_mask != "qa"):
        raise UserError("`speakers` goes with `data_type` jsonl and `loss_mask` qa")
    return Layout(
        tuple(sft_field or ("text",)),
        qa=loss_mask == "qa",
        template=templates.get(template) if template else None,
        speakers=parse_pairs(list(speakers)),
    )


def _common_template(
    data_file: str, sets: Sequence[Documents], given: Template | None
) -> Template | None:
    """The template of all data sets that have one; else the one that is given, or None."""
    found = {documents.template for documents in sets if documents.template}
    if len(found) > 1:
        names = ", ".join(sorted(template.name for template in found))
        raise UserError(
            f"`data_file` {data_file}: the data sets have different templates ({names}), so a "
            "model could not be asked as it was trained; prepare them with one"
        )
    return next(iter(found), given)


def require_sources(data_file: str, data_type: str) -> None:
    """UserError unless every data set that `data_file` names is there. Reads none of them."""
    for path, _ in parse_sources(data_file):
        if data_type == "binidx":
            _refuse_text(path)
            for file in file_paths(strip_extension(path)):
                require_file(file, strip_extension(path))
        else:
            find_inputs([path])


def _check_tokenizer(tokenizer: Tokenizer | None, data_type: str, vocab_size: int) -> None:
    if data_type != "binidx" and tokenizer is None:
        raise UserError(f"`data_type` {data_type} needs a tokenizer; pass `tokenizer`")
    if tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, but the model only "
            f"{vocab_size}; pass `tokenizer` with the model's own"
        )


def _refuse_text(data_file: str) -> None:
    if Path(data_file).is_file() and not exists(data_file):
        raise UserError(
            f"`data_file` {data_file} is no .bin/.idx pair; read it with `data_type` jsonl or "
            "sft, or make a pair of it with scripts/prepare_data.py"
        )


def _read_pair(
    data_file: str,
    vocab_size: int,
    loss_mask: str,
    tokenizer: Tokenizer | None,
    template: Template | None,
) -> Documents:
    _refuse_text(data_file)
    documents = read_binidx(strip_extension(data_file), vocab_size, loss_mask)
    made = read_provenance(documents.source, len(documents), documents.n_tokens)
    if made is None:
        return documents
    made.check(documents.source, tokenizer, template)
    return replace(documents, template=made.template)


def _read_text(
    path: str, layout: Layout, tokenizer: Tokenizer, on_bad: str, cache_dir: str | Path | None
) -> Documents:
    if cache_dir:
        return read_cached(path, layout, tokenizer, on_bad, cache_dir)
    return read_records(path, layout, tokenizer, on_bad)


def _split(documents: Documents, val_split: float) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents to train on and of those held out, each of two tokens or more."""
    if len(documents) == 0:
        raise DataError(f"{documents.source}: there are no documents in it")
    usable = np.flatnonzero(documents.sizes >= 2)
    if not val_split:
        return usable, usable[:0]
    held = held_out(documents, usable, val_split)
    for name, chosen in (("train on", ~held), ("hold out", held)):
        if not chosen.any():
            raise DataError(
                f"{documents.source}: `val_split` {val_split} leaves no document to {name}"
            )
    return usable[~held], usable[held]


def _rows(
    documents: Documents,
    chosen: np.ndarray,
    dataload: str,
    ctx_len: int,
    seed: int,
    whole: bool = False,
) -> SourceRows:
    if dataload == "get":
        if documents.n_tokens <= ctx_len:
            raise DataError(
                f"{documents.source}: {documents.n_tokens} tokens are too few for one window of "
                f"`ctx_len` {ctx_len} and its last target; lower `ctx_len` or use `dataload` pad"
            )
        return WindowRows(documents, ctx_len, seed)
    if len(chosen) == 0:
        raise DataError(f"{documents.source}: no document has two tokens, so there is no target")
    longest = max(ctx_len, int(documents.sizes[chosen].max()) - 1) if whole else ctx_len
    if dataload == "pack":
        return PackedRows(documents, chosen, ctx_len, seed, longest)
    return DocumentRows(documents, chosen, longest, seed)
