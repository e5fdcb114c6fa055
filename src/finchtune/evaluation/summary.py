"""Shares and means with their 95 % confidence intervals."""

import math
from collections.abc import Sequence
from typing import Any

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(rate: float, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share `rate` seen in n trials (Wilson 1927)."""
    middle = rate + Z**2 / (2 * n)
    spread = Z * math.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2))
    whole = 1 + Z**2 / n
    # Rounding must not take the interval's end past a share of 0 or 1.
    return min(max((middle - spread) / whole, 0.0), rate), max(
        min((middle + spread) / whole, 1.0), rate
    )


def share(right: Sequence[bool]) -> dict[str, Any]:
    """How many of some questions are right."""
    n, count = len(right), sum(right)
    low, high = wilson(count / n, n)
    return {"right": count, "of": n, "rate": count / n, "low": low, "high": high}


def pass_at(k: int, n: int, right: int) -> float:
    """The probability that k of n answers hold a right one (Chen et al. 2021, equation 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def weighted_mean(sums: Sequence[float], weights: Sequence[int]) -> tuple[float, float, float]:
    """sum(sums) / sum(weights) and its interval, each pair being one independent document.

    The interval is that of a ratio estimator, and is the mean alone for a single document.
    """
    n, total = len(sums), sum(weights)
    mean = math.fsum(sums) / total
    residuals = math.fsum((s - mean * w) ** 2 for s, w in zip(sums, weights, strict=True))
    error = math.sqrt(n / max(n - 1, 1) * residuals) / total
    return mean, mean - Z * error, mean + Z * error
