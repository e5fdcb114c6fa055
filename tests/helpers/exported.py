"""Writing a form without what lies beside it."""

from finchtune.weights.forms import Form, Settings


def write(form: Form, weights, path, settings: Settings) -> str | None:
    """The form's own `write`, into a folder made for it if it is one."""
    if not form.suffix:
        path.mkdir()
    return form.write(weights, path, settings)
