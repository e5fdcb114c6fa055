"""Hashes that a thread computes: whatever goes wrong there reaches whoever waits."""

import pytest

from finchtune.weights.hashing import hashing


def test_no_error_leaves_anyone_waiting():
    with pytest.raises(ValueError, match="null byte"):
        hashing("a\0b").result(timeout=5)
