"""Files of initial states: ours, merged ones, and what other software reads and writes."""

import pytest
import torch
from helpers.support import (
    REPOSITORY,
    assert_one_error_line,
    relative_error,
    run_script,
    rwkv_package,
    rwkv_package_logits,
    save_model,
    small_model,
)

from finchtune.errors import UserError
from finchtune.weights.base import load_model
from finchtune.weights.merging import merge_files
from finchtune.weights.state_files import load_state, read_states, set_states
from finchtune.weights.tensors import read_tensors, write_tensors

TOKENS = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(5)).tolist()


@pytest.fixture
def files(tmp_path):
    """A base file, and a state file as training writes it."""
    base = save_model(small_model(), tmp_path / "base.pth")
    states = {f"blocks.{i}.att.time_state": torch.randn(8, 8, 8) for i in range(2)}
    write_tensors(states, tmp_path / "state.pth")
    return base, tmp_path / "state.pth", tmp_path / "merged.pth"


def logits_of(model):
    return model(torch.tensor([TOKENS]))[0][0]


def test_a_state_file_gives_our_logits_in_the_rwkv_package(files):
    """As its users load one: each block's state transposed, fp32, between two zero vectors."""
    base, path, _ = files
    runtime, states = rwkv_package(base), torch.load(path)
    given = []
    for i in range(2):
        state = states[f"blocks.{i}.att.time_state"].transpose(1, 2).float().contiguous()
        given += [torch.zeros(64), state, torch.zeros(64)]
    expected, _ = runtime.forward(TOKENS, given, full_output=True)
    model = load_model(base)
    plain = logits_of(model)
    set_states(model, path)
    assert relative_error(logits_of(model), expected) < 1e-4
    assert relative_error(plain, expected) > 1e-2


def test_a_merged_file_does_so_too(files):
    base, path, merged = files
    receipt = merge_files(base, path, merged, methods=("state",))
    assert (receipt["method"], receipt["replaced"]) == ("state", 2)
    model = load_model(merged)
    assert len(model.initial_states()) == 2
    assert relative_error(logits_of(model), rwkv_package_logits(merged, TOKENS)) < 1e-4
    for name, tensor in read_tensors(base).items():
        assert torch.equal(read_tensors(merged)[name], tensor)


def test_several_states_share_one_model(files):
    base, path, _ = files
    model, own = load_model(base), load_model(base)
    set_states(own, path)
    found, _ = model(torch.tensor([TOKENS]), load_state(path, model))
    torch.testing.assert_close(found[0], logits_of(own))
    assert not model.initial_states()


def test_merged_states_can_be_taken_out_and_changed(files, tmp_path):
    base, path, merged = files
    merge_files(base, path, merged)
    model = load_model(base)
    for name, tensor in read_states(merged, model).items():
        assert torch.equal(tensor, read_tensors(path)[name])
    others = {name: -tensor for name, tensor in read_tensors(path).items()}
    write_tensors(others, tmp_path / "other.pth")
    merge_files(merged, tmp_path / "other.pth", tmp_path / "again.pth")
    assert torch.equal(
        read_tensors(tmp_path / "again.pth")["blocks.1.att.time_state"],
        others["blocks.1.att.time_state"],
    )


def test_keys_with_a_prefix_are_understood(files, tmp_path):
    base, path, _ = files
    prefixed = {f"model.{name}": tensor for name, tensor in read_tensors(path).items()}
    write_tensors(prefixed, tmp_path / "prefixed.pth")
    assert (
        read_states(tmp_path / "prefixed.pth", load_model(base)).keys() == read_tensors(path).keys()
    )


def test_states_of_another_model_are_refused(files, tmp_path):
    _, path, merged = files
    other = save_model(small_model(n_layer=3), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"blocks\.2\.att\.time_state is missing"):
        merge_files(other, path, merged)
    with pytest.raises(UserError, match=r"blocks\.2\.att\.time_state is missing"):
        read_states(path, load_model(other))
    with pytest.raises(UserError, match="no initial states"):
        read_states(other, load_model(other))
    assert not merged.exists()


def test_the_script(files):
    base, path, merged = files
    assert (REPOSITORY / "merge/merge_state.py").exists()
    flags = ("--base_model", base, "--output", merged)
    done = run_script("merge/merge_state.py", *flags, "--state_checkpoint", path)
    assert done.returncode == 0, done.stderr
    assert len(load_model(merged).initial_states()) == 2
    flags = ("--base_model", base, "--output", merged.with_name("other.pth"))
    done = run_script("merge/merge_state.py", *flags, "--state_checkpoint", base)
    assert_one_error_line(done, "not state")
