"""One context over several processes, against one process."""

import pytest
import torch
from helpers.context_process import CASES
from helpers.contexts import long_batch, plain_gradients, trainable
from helpers.support import REPOSITORY, relative_error

from finchtune.distributed.launch import run_processes

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
PROCESS = REPOSITORY / "tests/helpers/context_process.py"
H, N, C = 8, 8, 64  # of the small model


@pytest.mark.parametrize(
    "processes",
    [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)
def test_several_processes_compute_what_one_does(tmp_path, monkeypatch, processes):
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY / 'src'}:{REPOSITORY / 'tests'}")
    path = tmp_path / "found.pth"
    assert run_processes(processes, [str(PROCESS), str(path)]) == 0
    found = torch.load(path)
    for case, result in zip(CASES, found["results"], strict=True):
        kind, trained, dtype = case[:3]
        one = plain_gradients(trainable(trained, dtype), long_batch(kind))[1]
        loss, exact = plain_gradients(trainable(trained, torch.float64), long_batch(kind))
        assert relative_error(result.pop("loss"), loss) < LIMITS[dtype], case
        assert result.keys() == exact.keys()
        for name, gradient in exact.items():
            limit = max(LIMITS[dtype], 4 * relative_error(one[name], gradient))
            assert relative_error(result[name], gradient) < limit, (case, name)
    # Forward: a state, its decays and two vectors for each layer; backward: the gradients of the
    # state and of the vectors.
    per_layer = (H * N * N + H * N + 2 * C) + (H * N * N + 2 * C)
    assert found["bytes"] == [2 * 4 * per_layer] * 2, "whatever the number of tokens"
