"""From logits to a token: every setting against its definition."""

import pytest
import torch

from finchtune.errors import UserError
from finchtune.inference.sampling import Sampler, Sampling

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()


def shares(n=4000, logits=LOGITS, **settings):
    """How often each id is drawn."""
    sampler = Sampler(Sampling(seed=0, **settings), [])
    drawn = [sampler.draw(logits.clone()) for _ in range(n)]
    return torch.bincount(torch.tensor(drawn), minlength=len(logits)) / n


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.0}, [1, 0, 0, 0]),
        ({"temperature": 1.0}, [0.5, 0.25, 0.15, 0.1]),
        ({"temperature": 1e-30}, [1, 0, 0, 0]),
        ({"temperature": 1e-46, "top_p": 0.9}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, [x / 0.345 for x in (0.25, 0.0625, 0.0225, 0.01)]),
        ({"temperature": 1.0, "top_p": 0.7}, [2 / 3, 1 / 3, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.76}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        ({"temperature": 1.0, "top_p": 1e-9}, [1, 0, 0, 0]),
        ({"temperature": 1.0, "top_k": 3}, [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_settings(settings, expected):
    assert torch.allclose(shares(**settings), torch.tensor(expected).float(), atol=0.03)


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_nucleus_is_the_smallest_that_reaches_top_p(top_p):
    """Over a large vocabulary, where most tokens are dropped before the sort."""
    logits = 3 * torch.randn(5000)
    sampler = Sampler(Sampling(temperature=1.0, top_p=top_p, seed=0), [])
    drawn = {sampler.draw(logits.clone()) for _ in range(2000)}
    probabilities, order = logits.double().softmax(-1).sort(descending=True)
    size = 1 + int((probabilities.cumsum(0) < top_p).sum())
    assert drawn <= set(order[:size].tolist())
    assert len(drawn) > min(size, 200) / 2


def test_repetition_penalty_reaches_prompt_and_text():
    sampler = Sampler(Sampling(repetition_penalty=2.0), prompt=[0])
    drawn = [sampler.draw(torch.tensor([3.0, 2.0, -1.0, -1.5])) for _ in range(3)]
    # [1.5, 2, -1, -1.5], then [1.5, 1, -1, -1.5]
    assert drawn == [1, 0, 0]
    negative = Sampler(Sampling(repetition_penalty=2.0), prompt=[2])
    assert negative.draw(torch.tensor([-9.0, -9.0, -1.0, -1.5])) == 3


def test_presence_and_frequency_penalties_count_the_text_alone():
    presence = Sampler(Sampling(presence_penalty=1.0), prompt=[0])
    assert [presence.draw(torch.tensor([2.0, 1.5, 0.9])) for _ in range(4)] == [0, 1, 0, 0]
    frequency = Sampler(Sampling(frequency_penalty=1.0), prompt=[0])
    assert [frequency.draw(torch.tensor([2.0, 1.5, 0.9])) for _ in range(4)] == [0, 1, 0, 2]


def test_counts_decay():
    """With a decay of 0.5 the count of one use is 1, 0.5, 0.25, ... at the tokens after it."""
    sampler = Sampler(Sampling(frequency_penalty=1.0, penalty_decay=0.5), prompt=[])
    flat = torch.tensor([2.0, 1.7])
    assert [sampler.draw(flat.clone()) for _ in range(5)] == [0, 1, 0, 1, 0]
    assert sampler.counts == {0: pytest.approx(1 + 0.25 + 0.0625), 1: pytest.approx(0.5 + 0.125)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1}, r"temperature must be in \[0, 100\], not -1"),
        ({"temperature": float("nan")}, r"temperature must be in \[0, 100\], not nan"),
        ({"top_p": 0}, "top_p must be in"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"temperature": 10**400}, "temperature must be in"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty must be in"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"repetition_penalty": 0}, "repetition_penalty must be in"),
        ({"presence_penalty": 3}, "presence_penalty must be in"),
        ({"penalty_decay": 0}, "penalty_decay must be in"),
        ({"seed": -1}, "seed must be in"),
    ],
)
def test_settings_out_of_their_limits_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
