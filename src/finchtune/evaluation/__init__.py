"""How well a model does a task."""

from finchtune.evaluation.exact_match import Answer, exact_match, final_number

__all__ = ["Answer", "exact_match", "final_number"]
