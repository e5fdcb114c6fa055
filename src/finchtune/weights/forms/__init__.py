"""The forms that weights come and go in: one file, one form, found by its FORM."""

from finchtune.weights.forms.base import DTYPES, Form, LowRank, Settings
from finchtune.weights.forms.registry import FORMS, form_of, get_form

__all__ = ["DTYPES", "FORMS", "Form", "LowRank", "Settings", "form_of", "get_form"]
