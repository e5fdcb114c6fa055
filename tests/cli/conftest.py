"""Running a script in the tests' own process, which spares starting Python and torch anew."""

import runpy
import signal
import sys

import pytest


@pytest.fixture
def run(request, monkeypatch, capsys):
    """Run the SCRIPT of the test's class or module: exit status, standard output and error."""
    script = str((request.cls or request.module).SCRIPT)
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(script, run_name="__main__")
        return stop.value.code, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)
