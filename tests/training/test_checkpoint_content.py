"""Checkpoints whose checksums are right, but which no run has written."""

import copy
from pathlib import Path

import pytest
import torch
from helpers.support import small_model

from finchtune.adapters import attach
from finchtune.errors import CheckpointError
from finchtune.training.checkpoint_content import check_manifest, check_state

MANIFEST = {
    **{"step": 2, "optimizer_step": 2, "global_batch": 4, "config": {}, "data": {}},
    **{"base": {"sha256": "0"}, "content": "0", "dtype": "torch.float32"},
    **{"data_changes": [], "validation": [[1, 2.5]]},
}


@pytest.mark.parametrize(
    "change",
    [{"step": "2"}, {"step": True}, {"config": []}, {"base": {}}, {"content": None},
     {"validation": [[1]]}, {"validation": [["x", 1.0]]}, {"data_changes": {}}],
)  # fmt: skip
def test_manifests_hold_what_resuming_reads(change):
    check_manifest(MANIFEST, Path("step-2"))
    with pytest.raises(CheckpointError, match="step-2: its manifest makes no sense"):
        check_manifest(MANIFEST | change, Path("step-2"))


NAME = "blocks.0.att.key.adapter.bone"
BAD = {
    "a moment is missing": lambda s: s["exp_avg"].pop(NAME),
    "a moment of another shape": lambda s: s["exp_avg"].update({NAME: torch.zeros(3)}),
    "NaN": lambda s: s["exp_avg_sq"][NAME].fill_(torch.nan),
    "integers": lambda s: s["trained"].update({NAME: s["trained"][NAME].int()}),
    "no tensor": lambda s: s["exp_avg"].update({NAME: 3}),
    "no dict": lambda s: s.update({"exp_avg": []}),
    "a number": lambda s: s.update({"trained": 3}),
    "no frozen": lambda s: s.pop("frozen"),
    "an odd loss scale": lambda s: s.update({"loss_scale": {"cur_scale": "x"}}),
}


@pytest.mark.parametrize("kind", BAD)
def test_states_are_whole_and_finite(kind):
    model = attach(small_model(), "bone", r=8)
    trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    state = {part: copy.deepcopy(trained) for part in ("trained", "exp_avg", "exp_avg_sq")}
    state |= {"frozen": {}, "loss_scale": {"cur_scale": 2.0, "dtype": torch.float16}}
    check_state(state, model, Path("step-2"))
    BAD[kind](state)
    with pytest.raises(CheckpointError, match="`resume` step-2: "):
        check_state(state, model, Path("step-2"))
