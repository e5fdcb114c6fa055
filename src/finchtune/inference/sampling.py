"""From logits to a token: penalties, temperature, top-k, top-p."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from finchtune.errors import UserError

COLD = 1e-4  # a temperature below which only the likeliest token has a weight
LIMITS = {
    "temperature": ("in [0, 100]", lambda x: 0 <= x <= 100),
    "top_p": ("in (0, 1]", lambda x: 0 < x <= 1),
    "top_k": ("at least 0", lambda x: x >= 0),
    "repetition_penalty": ("in [0.01, 100]", lambda x: 0.01 <= x <= 100),
    "presence_penalty": ("in [-2, 2]", lambda x: -2 <= x <= 2),
    "frequency_penalty": ("in [-2, 2]", lambda x: -2 <= x <= 2),
    "penalty_decay": ("in (0, 1]", lambda x: 0 < x <= 1),
    "seed": ("in [0, 2^63)", lambda x: x is None or 0 <= x < 2**63),
}


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises UserError for a setting out of its limits.

    `temperature` 0 takes the likeliest token. `top_k` keeps that many of the likeliest (0: all),
    `top_p` the fewest whose probabilities reach it. `repetition_penalty` divides the positive and
    multiplies the negative logits of tokens in the prompt and the text so far (Keskar et al.,
    arXiv 1909.05858). `presence_penalty` is subtracted from the logits of tokens in the text so
    far, `frequency_penalty` times their counts too, each count having been multiplied by
    `penalty_decay` at every token since. The same `seed` gives the same text.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_decay: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, (limits, holds) in LIMITS.items():
            value = getattr(self, name)
            if not holds(value):  # false for NaN too
                raise UserError(f"{name} must be {limits}, not {str(value)[:40]}")

    @property
    def is_plain_greedy(self) -> bool:
        """Whether the likeliest token is taken, with no penalty."""
        return self.temperature == 0 and not self.counts and self.repetition_penalty == 1

    @property
    def counts(self) -> bool:
        """Whether the tokens of the text so far are counted."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0


class Sampler:
    """Draws the tokens of one text. Its draws depend on its own past and logits alone."""

    def __init__(self, sampling: Sampling, prompt: Iterable[int]):
        self.sampling = sampling
        self.generator = torch.Generator()
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)
        self.seen = set(prompt) if sampling.repetition_penalty != 1 else None
        self.counts: dict[int, float] = {}

    def draw(self, logits: Tensor) -> int:
        """The next token's id, from logits (V,) float32 on the CPU, which may be overwritten."""
        token = self._choose(self._penalise(logits))
        if self.seen is not None:
            self.seen.add(token)
        if self.sampling.counts:
            self.counts = {id: n * self.sampling.penalty_decay for id, n in self.counts.items()}
            self.counts[token] = self.counts.get(token, 0.0) + 1
        return token

    def _penalise(self, logits: Tensor) -> Tensor:
        settings = self.sampling
        if self.seen:
            ids = torch.tensor(sorted(self.seen))
            values, penalty = logits[ids], settings.repetition_penalty
            logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
        if self.counts:
            ids = torch.tensor(list(self.counts))
            counts = torch.tensor(list(self.counts.values()))
            logits[ids] -= settings.presence_penalty + settings.frequency_penalty * counts
        return logits

    def _choose(self, logits: Tensor) -> int:
        settings = self.sampling
        if settings.temperature < COLD:
            return int(logits.argmax())
        ids = None
        if 0 < settings.top_k < len(logits):
            logits, ids = logits.topk(settings.top_k)
        weights = ((logits - logits.max()) / settings.temperature).exp_()
        if settings.top_p < 1:
            weights, places = nucleus(weights, settings.top_p)
            ids = places if ids is None else ids[places]
        cumulative = weights.double().cumsum(0)
        drawn = torch.rand((), generator=self.generator, dtype=torch.float64)
        place = int(torch.searchsorted(cumulative, drawn * cumulative[-1], right=True))
        place = min(place, len(cumulative) - 1)
        return place if ids is None else int(ids[place])


def nucleus(weights: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest of `weights` (V) whose sum reaches `top_p` of the whole, and their places."""
    total = float(weights.double().sum())
    # Those below this share are together less than 1 - top_p, so that none of them is needed.
    large = (weights >= (1 - top_p) * total / len(weights)).nonzero().squeeze(1)
    ordered, index = weights[large].sort(descending=True, stable=True)
    n = 1 + int((ordered.double().cumsum(0) < top_p * total).sum())
    return ordered[:n], large[index[:n]]
