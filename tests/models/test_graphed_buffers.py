"""The memory that graphs of all blocks and all shapes share."""

import pytest
import torch
from helpers.support import small_model
from helpers.tape import TapeRecorder

from finchtune.adapters import attach
from finchtune.models.graphed_blocks import GraphedBlocks

LAYERS = 2


def bone_model(n_layer=LAYERS):
    model = attach(small_model(n_layer=n_layer), "bone", r=8)
    model.grad_checkpoint = 1
    return model.train()


def graphed_model(n_layer=LAYERS):
    model = bone_model(n_layer)
    model.graphs = GraphedBlocks(TapeRecorder())
    return model


def loss_of(model, length, n=0):
    tokens = torch.randint(256, (2, length), generator=torch.Generator().manual_seed(n))
    return model.loss(tokens, tokens)[0]


def trained_on(model, lengths):
    """The losses of one forward and backward for each length."""
    losses = []
    for n, length in enumerate(lengths):
        loss = loss_of(model, length, n)
        loss.backward()
        losses.append(loss.item())
    return losses


def gradients(model):
    return [p.grad for p in model.parameters() if p.requires_grad]


def buffer_bytes(model):
    return sum(x.nbytes for x in model.graphs.buffers.made.values())


def test_buffers_are_shared_by_all_blocks():
    few, many = graphed_model(2), graphed_model(5)
    for model in (few, many):
        trained_on(model, [24] * 3)
    assert buffer_bytes(few) == buffer_bytes(many)


@pytest.mark.parametrize("lengths", [(24, 8, 16), (8, 16, 24)], ids=["falling", "rising"])
def test_many_shapes_take_the_memory_of_the_largest(lengths):
    one, many, plain = graphed_model(), graphed_model(), bone_model()
    trained_on(one, [24] * 2)
    lengths = [length for length in lengths for _ in range(2)] * 2
    assert trained_on(many, lengths) == trained_on(plain, lengths)
    assert all(map(torch.equal, gradients(many), gradients(plain)))
    assert buffer_bytes(many) == buffer_bytes(one)


def test_larger_shapes_free_the_graphs_of_smaller_ones_which_are_recorded_anew():
    model = graphed_model()
    tapes = model.graphs.record.tapes
    trained_on(model, [8, 8])
    assert len(tapes) == 2 * LAYERS
    trained_on(model, [16, 16])
    assert len(tapes) == 4 * LAYERS
    shapes = [x for known in model.graphs.graphs.values() for x in known.values()]
    assert shapes.count(None) == LAYERS
    trained_on(model, [8, 16, 8, 16])
    assert len(tapes) == 6 * LAYERS


def test_a_larger_shape_may_come_between_a_forward_and_its_backward():
    models = graphed_model(), bone_model()
    for model in models:
        trained_on(model, [8, 8, 16])
        small, large = loss_of(model, 8, 7), loss_of(model, 16, 8)
        large.backward()
        small.backward()
    assert all(map(torch.equal, *map(gradients, models)))
