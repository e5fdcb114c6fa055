"""What was tokenised for one run, kept for the next: a .bin/.idx pair that all processes map."""

from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path

from finchtune import distributed
from finchtune.data.binidx import file_paths, token_dtype
from finchtune.data.documents import MASK_SUFFIX, Documents, read_binidx
from finchtune.data.inputs import find_inputs
from finchtune.data.prepare import prepare
from finchtune.data.provenance import info_path
from finchtune.data.render import Layout
from finchtune.data.workers import Recipe
from finchtune.errors import UserError
from finchtune.files import FileSet, check_sums, json_text, read_json, sha256, sums_text
from finchtune.tokenizer import Tokenizer


def read_cached(
    source: str, layout: Layout, tokenizer: Tokenizer, on_bad: str, cache_dir: str | Path
) -> Documents:
    """The documents of a file, glob or folder of records, tokenised at most once.

    The entry's name holds a hash of the content and of all that the tokens depend on. Once per run
    and machine its own content is checked too, and a damaged one made again. A collective call:
    rank 0 makes the entry, and the others only where they do not see its disk.
    """
    recipe = Recipe(layout, tokenizer.name, token_dtype(tokenizer.vocab_size).str, on_bad=on_bad)
    paths = find_inputs([source])
    prefix = Path(cache_dir) / f"{paths[0].name}-{_key(paths, recipe)}"

    def make() -> None:
        try:
            _check(prefix)
            _read(source, prefix, recipe, tokenizer.vocab_size)
        except UserError:  # missing or damaged
            _make(source, prefix, recipe)

    distributed.run_on_rank_zero(make)
    if distributed.local_rank() == 0 and distributed.rank() != 0:
        make()
    distributed.barrier()
    return _read(source, prefix, recipe, tokenizer.vocab_size)


def _make(source: str, prefix: Path, recipe: Recipe) -> None:
    """Tokenise: the entry, its note and the sha256 of all its files appear together."""
    with FileSet() as files:
        totals = prepare([source], str(prefix), recipe, files=files)
        files.add(_note(prefix)).write_text(json_text(asdict(totals)))
        digests = {name: sha256(path) for name, path in files.written().items()}
        files.add(_sums(prefix)).write_text(sums_text(digests))


def _check(prefix: Path) -> None:
    """Raise UserError unless every file of an entry holds what was written."""
    totals = read_json(_note(prefix))
    paths = [*file_paths(prefix), info_path(prefix), _note(prefix)]
    if isinstance(totals, dict) and totals.get("masked_tokens"):
        paths += file_paths(f"{prefix}{MASK_SUFFIX}")
    check_sums(_sums(prefix), {path.name for path in paths})


def _sums(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".sha256")


def _read(source: str, prefix: Path, recipe: Recipe, vocab_size: int) -> Documents:
    """The documents of an entry. UserError unless it is whole."""
    totals = read_json(_note(prefix))
    masked = bool(totals["masked_tokens"])
    documents = read_binidx(prefix, vocab_size, "qa" if masked else "none")
    template = recipe.layout.chosen_template if totals["templated"] else None
    found = {"skipped": totals["skipped"], "unknown": totals["unknown"], "template": template}
    return replace(documents, source=source, **found)


def _note(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".json")


def _key(paths: list[Path], recipe: Recipe) -> str:
    """A hash of everything that the tokens, and the report of bad records, depend on."""
    vocabulary = Path(recipe.tokenizer)
    layout = recipe.layout
    key = blake2b(repr((recipe, layout.chosen_template)).encode(), digest_size=8)
    for path in [*paths, vocabulary] if vocabulary.is_file() else paths:
        key.update(repr((path.suffixes, path.stat().st_size)).encode())
        with path.open("rb") as content:
            while block := content.read(1 << 20):
                key.update(block)
    return key.hexdigest()
