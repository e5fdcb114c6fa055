"""Fixtures of the operators' tests."""

import pytest
from helpers.wkv import named_form, one_thread
from helpers.wkv_operators import OPERATORS


@pytest.fixture
def quiet():
    with one_thread():
        yield


@pytest.fixture
def form(request, name):
    """The operator by the named form; the CPU kernel's forms where this processor has them."""
    one = OPERATORS[name]
    with named_form(request, one.fastest, one.chunked) as named:
        yield named
