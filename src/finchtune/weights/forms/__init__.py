"""The forms that weights come and go in: one file, one form, found by its FORM."""

from finchtune.weights.forms.base import DTYPES, Form, FoundAdapter, LowRank, Settings
from finchtune.weights.forms.registry import FORMS, adapter_form_of, form_of, get_form

__all__ = [
    "DTYPES",
    "FORMS",
    "Form",
    "FoundAdapter",
    "LowRank",
    "Settings",
    "adapter_form_of",
    "form_of",
    "get_form",
]
