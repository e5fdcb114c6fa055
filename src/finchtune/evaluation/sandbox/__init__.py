"""Programs that a model wrote, run where they can do no harm."""

from finchtune.evaluation.sandbox.run import require_sandbox, run_program, run_programs

__all__ = ["require_sandbox", "run_program", "run_programs"]
