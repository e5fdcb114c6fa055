"""The WKV operators of all generations, with cases for each, for tests of what they do alike."""

from dataclasses import dataclass
from typing import Any

import pytest
from helpers import wkv6_cases, wkv7_cases
from helpers.wkv import CPU_PATHS

from finchtune.ops.wkv6 import wkv6, wkv6_chunked, wkv6_reference
from finchtune.ops.wkv7 import wkv7, wkv7_chunked, wkv7_reference


@dataclass
class Operator:
    """An operator in its forms, its numbers of (B, T, H, N) and of all inputs, and cases for it."""

    fastest: Any
    chunked: Any
    reference: Any
    n_rows: int
    n_inputs: int
    cases: Any


OPERATORS = {
    "wkv6": Operator(wkv6, wkv6_chunked, wkv6_reference, 4, 6, wkv6_cases),
    "wkv7": Operator(wkv7, wkv7_chunked, wkv7_reference, 6, 7, wkv7_cases),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)
every_form = pytest.mark.parametrize("form", ["chunked", *CPU_PATHS], indirect=True)


every_regime = pytest.mark.parametrize(
    ("name", "regime"), [(name, x) for name, one in OPERATORS.items() for x in one.cases.REGIMES]
)
