"""Blocks by CUDA graphs train as they do without."""

import pytest
import torch
from helpers.support import every_generation, small_model

from finchtune.adapters import attach
from finchtune.models.graphed_blocks import cuda_graphs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYERS = 3
METHODS = {
    "all": None,
    "bone": {"method": "bone", "r": 16},
    "bat": {"method": "bat", "r": 16, "mode": "row"},
    "lora, dropout": {"method": "lora", "r": 4, "dropout": 0.3},
    "bone on nf4": {"method": "bone", "r": 16, "quant": "nf4"},
}


def trained_model(method, generation, dtype):
    model = small_model(n_layer=LAYERS, n_embd=128, head_size=64, generation=generation)
    if METHODS[method]:
        torch.manual_seed(1)
        attach(model, **METHODS[method])
    model.grad_checkpoint = 1
    return model.to("cuda", dtype).train()


def steps(model, count=4):
    """Losses of steps of two micro batches, and the last step's gradients and random state."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD(trained.values(), lr=1e-4)
    losses = []
    for step in range(count):
        torch.manual_seed(step)
        optimizer.zero_grad()
        for _ in range(2):
            tokens = torch.randint(256, (2, 80)).cuda()
            loss = model.loss(tokens, tokens)[0]
            loss.backward()
            losses.append(loss.detach())
        if step < count - 1:
            optimizer.step()
    return torch.stack(losses), {n: p.grad for n, p in trained.items()}, torch.cuda.get_rng_state()


@pytest.mark.parametrize("method", METHODS)
@every_generation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_those_without_graphs(method, generation, dtype):
    """The same kernels run on the same numbers; only libraries may choose others."""
    graphed, model = (trained_model(method, generation, dtype) for _ in range(2))
    graphed.graphs = cuda_graphs(torch.device("cuda"))
    losses, gradients, random = steps(graphed)
    losses_expected, expected, random_expected = steps(model)
    assert all(len(known) == 1 for known in graphed.graphs.graphs.values())
    assert len(graphed.graphs.graphs) == LAYERS
    assert torch.equal(random, random_expected)
    torch.testing.assert_close(losses, losses_expected, rtol=1e-5, atol=0)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for name, gradient in expected.items():
        error = (gradients[name].float() - gradient.float()).abs().max()
        assert error <= limit * gradient.float().abs().max(), name


def test_larger_shapes_replace_the_buffers_of_smaller_ones():
    graphed, model = (trained_model("bone", 6, torch.float32) for _ in range(2))
    graphed.graphs = cuda_graphs(torch.device("cuda"))
    for step, length in enumerate((80, 80, 112, 112, 80, 112)):
        torch.manual_seed(step)
        tokens = torch.randint(256, (2, length)).cuda()
        losses = [one.loss(tokens, tokens)[0] for one in (graphed, model)]
        torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
        for loss in losses:
            loss.backward()
    for known in graphed.graphs.graphs.values():
        assert [graphs is not None for graphs in known.values()] == [True, True]
    for mine, other in zip(graphed.parameters(), model.parameters(), strict=True):
        if other.grad is not None:
            assert (mine.grad - other.grad).abs().max() <= 1e-5 * other.grad.abs().max()


def test_a_step_under_deepspeed_is_the_one_without_graphs():
    pytest.importorskip("deepspeed")
    from finchtune import distributed
    from finchtune.config import TrainConfig
    from finchtune.data import Batch
    from finchtune.training.engine import Engine

    device, found = torch.device("cuda", 0), []
    distributed.init_process_group(device)
    for graphs in (True, False):
        config = TrainConfig(peft="bone", micro_bsz=2, cuda_graphs=graphs)
        engine = Engine(trained_model("bone", 6, torch.bfloat16), config, device)
        torch.manual_seed(0)
        batches = [Batch(*torch.randint(256, (2, 2, 80))) for _ in range(4)]
        found.append([engine.step([batch], 1e-3) for batch in batches])
        engine.close()
    distributed.shutdown()
    for ours, theirs in zip(*found, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-2)
