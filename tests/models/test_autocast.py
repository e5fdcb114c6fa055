"""Models with fp32 weights under torch's autocast."""

import torch
from helpers.support import every_generation, small_model


@every_generation
def test_a_step_under_autocast_is_near_the_one_in_fp32(generation, kernels):
    model = small_model(generation=generation)
    tokens, labels = torch.randint(0, 256, (2, 2, 20))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = model.loss(tokens, labels)[0]
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for expected, found in zip(*results, strict=True):
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= 0.1 * expected.norm()
