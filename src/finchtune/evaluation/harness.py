"""A finchtune model as lm-evaluation-harness's `LM`, which runs any of its tasks."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from finchtune.errors import UserError
from finchtune.evaluation.asking import Asker, Wish
from finchtune.evaluation.likelihood import log_likelihoods
from finchtune.tokenizer import END_OF_DOCUMENT, load_tokenizer
from finchtune.weights.writing import writing_model

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise UserError("lm-evaluation-harness is missing: pip install 'finchtune[eval]'") from error

MAX_TOKENS = 256  # of an answer where a task does not say
REQUESTS = 256  # documents whose log-likelihoods are found in one call


@register_model("finchtune")
class FinchtuneLM(TemplateLM):
    """The model of a .pth, with an adapter that stays unmerged if there is one.

    `device` defaults to the GPU if there is one; `dtype` is torch's name of one; `max_rows` is how
    many answers are written at once, by default as many as memory holds.
    """

    def __init__(
        self,
        model: str,
        peft_checkpoint: str | None = None,
        tokenizer: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        max_rows: int | None = None,
        **ignored: Any,
    ):
        super().__init__()
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        loaded = writing_model(
            model, peft_checkpoint, getattr(torch, dtype) if dtype else None, where
        )
        own = load_tokenizer(tokenizer, loaded.config.vocab_size)
        self.asker = Asker(loaded, own, max_rows)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, and begins one."""
        return END_OF_DOCUMENT

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, with nothing added."""
        return self.asker.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation after its context; whether it is the likeliest."""
        documents = [
            (context + continuation, [False] * len(context) + [True] * len(continuation))
            for _, context, continuation in requests
        ]
        # Documents of one length waste no padding.
        order = sorted(range(len(documents)), key=lambda i: -len(documents[i][0]))
        found: dict[int, tuple[float, bool]] = {}
        for start in tqdm(range(0, len(order), REQUESTS), disable=disable_tqdm):
            part = order[start : start + REQUESTS]
            scores = log_likelihoods(self.asker.model, [documents[i] for i in part])
            found |= zip(part, scores, strict=True)
        return [found[i] for i in range(len(documents))]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihood of each whole text as a document: the state has no window."""
        whole = [(None, [self.eot_token_id], self.tok_encode(r.args[0])) for r in requests]
        return [total for total, _ in self._loglikelihood_tokens(whole, disable_tqdm)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to its stop strings."""
        wishes = [
            wish_of(request.args[0], request.args[1], seed) for seed, request in enumerate(requests)
        ]
        with tqdm(total=len(wishes), disable=disable_tqdm) as bar:
            self.asker.advance = bar.update
            return self.asker.write(wishes)


def wish_of(context: str, settings: dict[str, Any], seed: int) -> Wish:
    """A request for text. UserError for a setting that is not known."""
    until = settings.get("until") or []
    known = {"until", "max_gen_toks", "do_sample", "temperature"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UserError(f"generation_kwargs: {unknown[0]!r} is none of {', '.join(sorted(known))}")
    sampled = settings.get("do_sample", settings.get("temperature", 0) > 0)
    return Wish(
        context,
        settings.get("max_gen_toks", MAX_TOKENS),
        [until] if isinstance(until, str) else until,
        settings.get("temperature", 1.0) if sampled else 0.0,
        seed,
    )
