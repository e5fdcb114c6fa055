"""What was tokenised for one run, kept for the next: a .bin/.idx pair that all processes map."""

from dataclasses import asdict, replace
from hashlib import blake2b
from pathlib import Path

from finchtune import distributed
from finchtune.data.binidx import token_dtype
from finchtune.data.documents import Documents, read_binidx
from finchtune.data.inputs import find_inputs
from finchtune.data.prepare import Recipe, prepare
from finchtune.data.render import Layout
from finchtune.errors import UserError
from finchtune.files import read_json, write_json
from finchtune.tokenizer import Tokenizer


def read_cached(
    source: str, layout: Layout, tokenizer: Tokenizer, on_bad: str, cache_dir: str | Path
) -> Documents:
    """The documents of a file, glob or folder of records, tokenised at most once.

    The entry's name holds a hash of the content and of all that the tokens depend on. A
    collective call: rank 0 makes the entry, and the others only where they do not see its disk.
    """
    recipe = Recipe(layout, tokenizer.name, token_dtype(tokenizer.vocab_size).str, on_bad=on_bad)
    paths = find_inputs([source])
    prefix = Path(cache_dir) / f"{paths[0].name}-{_key(paths, recipe)}"

    def make() -> None:
        try:
            _read(source, prefix, recipe, tokenizer.vocab_size)
        except UserError:  # missing or damaged
            write_json(_note(prefix), asdict(prepare([source], str(prefix), recipe)))

    distributed.run_on_rank_zero(make)
    make()
    return _read(source, prefix, recipe, tokenizer.vocab_size)


def _read(source: str, prefix: Path, recipe: Recipe, vocab_size: int) -> Documents:
    """UserError unless the entry, whose note is written last, is whole."""
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
