"""Layer norm joined with the sum before it: the CUDA kernels, emulated, against float64."""

import itertools

import pytest
import torch
from helpers.elementwise_cases import outputs_and_gradients, random_inputs
from helpers.elementwise_emulator import cuda_kernels_in_place, emulated_library
from helpers.emulation import ORDERS
from helpers.support import every_generation, relative_error, small_model

from finchtune.ops.elementwise import AddedNorm
from finchtune.ops.kernels import cpu_standing_for, kernels_set_aside

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {"single elements": (2, 7, 45), "vectors": (70, 48), "long rows": (3, 2064)}


@pytest.fixture(autouse=True)
def emulated(kernels):
    with cuda_kernels_in_place("norm.cu"), cpu_standing_for("cuda"):
        yield


def joined(x, y, weight, bias):
    norm = AddedNorm(x.shape[-1], device="meta")
    del norm.weight, norm.bias  # the leaves themselves take their place
    norm.weight, norm.bias = weight, bias
    return norm(x, y)


def alone(x, weight, bias):
    return joined(x, None, weight, bias)


def check(function, inputs, dtype):
    """By the kernels no worse than twice as far from float64 as plain torch."""
    ours = outputs_and_gradients(function, inputs)
    with kernels_set_aside():
        plain = outputs_and_gradients(function, inputs)
        exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
        truth = outputs_and_gradients(function, exact)
    for mine, other, true in zip(ours, plain, truth, strict=True):
        assert mine.dtype == dtype
        allowed = 2 * relative_error(other, true) + 4 * torch.finfo(dtype).eps
        assert relative_error(mine, true) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("function", [joined, alone])
def test_as_near_to_the_truth_as_torch(function, shape, dtype, trained):
    rows = [shape] * (2 if function is joined else 1)
    inputs = random_inputs([*rows, shape[-1:], shape[-1:]], dtype)
    with torch.no_grad():
        inputs[0].add_(3)  # a mean far from zero
    for weight in inputs[-2:]:
        weight.requires_grad_(trained)
    check(function, inputs, dtype)


def test_gradients_of_one_result_alone():
    x, y, weight, bias = random_inputs([(5, 48), (5, 48), (48,), (48,)], torch.float32)
    for used in (0, 1):
        found = torch.autograd.grad(joined(x, y, weight, bias)[used].sin().sum(), (x, y))
        with kernels_set_aside():
            expected = torch.autograd.grad(joined(x, y, weight, bias)[used].sin().sum(), (x, y))
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other)


def test_the_operators_say_what_they_return():
    x, weight, bias = torch.randn(5, 48), torch.randn(48), torch.randn(48)
    checks, ops = ("test_schema", "test_faketensor"), torch.ops.finchtune
    for y in (torch.randn(5, 48), None):
        torch.library.opcheck(ops.added_norm, (x, y, weight, bias, 1e-5), test_utils=checks)
    moments = torch.rand(5, 2)
    for of_weight, dtotal in ((True, x + 1), (False, None)):
        inputs = x, dtotal, x + 2, moments, weight, of_weight
        torch.library.opcheck(ops.added_norm_backward, inputs, test_utils=checks)


def test_every_thread_schedule_gives_the_same_bits():
    inputs = random_inputs([(70, 48), (70, 48), (48,), (48,)], torch.float32)
    library, runs = emulated_library("norm.cu"), []
    for order, eager in itertools.product(range(len(ORDERS)), (False, True)):
        library.emulation_configure(order, eager, 1, 8)
        runs.append(outputs_and_gradients(joined, inputs))
    library.emulation_configure(0, False, 1, 8)
    for run in runs:
        assert all(map(torch.equal, run, runs[0]))


@every_generation
def test_a_model_computes_the_same(generation):
    model = small_model(generation=generation)
    tokens = torch.randint(256, (2, 9))
    found = []
    for aside in (False, True):
        with cpu_standing_for("cpu" if aside else "cuda"):
            loss, _ = model.loss(tokens, tokens)
            gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found.append([loss, *(g for g in gradients if g is not None)])
    for mine, other in zip(*found, strict=True):
        assert relative_error(mine, other) < 1e-4
