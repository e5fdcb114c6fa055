"""One context over several processes, against one process."""

import pytest
import torch
from helpers import engine_process
from helpers.context_process import CASES
from helpers.contexts import whole_context
from helpers.support import REPOSITORY, every_generation, relative_error

from finchtune import distributed
from finchtune.distributed.launch import run_processes

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
H, N, C = 8, 8, 64  # of the small model


def run(folder, processes, program):
    """What the first of several processes that run a program of tests/helpers has found."""
    path = folder / "found.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{REPOSITORY / 'src'}:{REPOSITORY / 'tests'}")
        command = [str(REPOSITORY / "tests/helpers" / program), str(path)]
        assert run_processes(processes, command) == 0
    return torch.load(path)


@pytest.fixture(
    scope="module",
    params=[2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)],
)
def shared(request, tmp_path_factory):
    """What so many processes compute of contexts that they share, by generation."""
    return run(tmp_path_factory.mktemp("shared"), request.param, "context_process.py")


@every_generation
def test_several_processes_compute_what_one_does(shared, generation):
    found = shared[generation]
    for case, result in zip(CASES, found["results"], strict=True):
        kind, trained, dtype = case[:3]
        _, one = whole_context(trained, dtype, kind, generation)
        loss, exact = whole_context(trained, torch.float64, kind, generation)
        assert relative_error(result.pop("loss"), loss) < LIMITS[dtype], case
        assert result.keys() == exact.keys()
        for name, gradient in exact.items():
            limit = max(LIMITS[dtype], 4 * relative_error(one[name], gradient))
            assert relative_error(result[name], gradient) < limit, (case, name)
    # Forward: a state, what becomes of the one before (decays or a matrix) and two vectors for each
    # layer; backward: the gradients of the state and of the vectors.
    transfer = H * N if generation == 6 else H * N * N
    per_layer = (H * N * N + transfer + 2 * C) + (H * N * N + 2 * C)
    assert found["bytes"] == [2 * 4 * per_layer] * 2, "whatever the number of tokens"


@pytest.mark.slow
def test_pairs_that_share_contexts_train_beside_each_other(tmp_path):
    """Two pairs of processes, each a micro batch, against one process that accumulates both."""
    found = run(tmp_path, 4, "engine_process.py")
    distributed.init_process_group(engine_process.CPU)
    for case, (steps, trained) in zip(engine_process.CASES, found, strict=True):
        expected_steps, expected = engine_process.outcome(case, engine_process.KINDS)
        for mine, plain in zip(steps, expected_steps, strict=True):
            assert mine == pytest.approx(plain, rel=1e-4), case
        for name, tensor in expected.items():
            assert relative_error(trained[name], tensor) < 2e-3, (case, name)
    distributed.shutdown()
