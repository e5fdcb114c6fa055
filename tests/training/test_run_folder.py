"""A run's folder belongs to one run; resuming checks before it touches anything."""

import dataclasses
import json
import os
import signal
import time

import pytest
import torch
from helpers.additions import flags, make_folder
from helpers.support import assert_one_error_line, metrics, run_script, train

from finchtune.config import TrainConfig
from finchtune.errors import UserError
from finchtune.training.checkpoints import save_checkpoint
from finchtune.training.run_folder import check_flags, choose_checkpoint, locked
from finchtune.weights.pth import tensors_of


def config_for(folder, **changes):
    return TrainConfig(load_model="m", data_file="d", proj_dir=str(folder), **changes)


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    folder = tmp_path / "new" / "run"
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(folder):
            os.write(writer, b"1")
            time.sleep(60)
    os.read(reader, 1)
    message = rf"another run is writing there \(process {child} on"
    with pytest.raises(UserError, match=message), locked(folder):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with locked(folder):
        assert (folder / ".lock").exists()
    assert not (folder / ".lock").exists()


def test_a_lock_leaves_no_folder_behind_where_nothing_was_written(tmp_path):
    with pytest.raises(UserError, match="bad data"), locked(tmp_path / "new" / "run"):
        raise UserError("bad data")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file, not a folder"), locked(tmp_path / "file"):
        pass


def test_a_planted_lock_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_finished_weights_are_not_written_over_and_the_advice_works(tmp_path):
    (tmp_path / "rwkv-0.pth").touch()
    with pytest.raises(UserError, match=r"rwkv-0\.pth of a run without checkpoints") as error:
        choose_checkpoint(config_for(tmp_path, resume="auto"))
    assert "`overwrite` 1 instead" in str(error.value)
    with pytest.raises(UserError, match="already holds a run") as error:
        choose_checkpoint(config_for(tmp_path))
    assert "`resume` auto" not in str(error.value), "which would be refused"
    assert choose_checkpoint(config_for(tmp_path, overwrite=True)) is None
    state = {"trained": {"a": torch.zeros(2)}, "adam_step": 1}
    path = save_checkpoint(tmp_path / "checkpoints", 1, state, tensors_of(state), {})
    with pytest.raises(UserError, match="resume with `resume` auto"):
        choose_checkpoint(config_for(tmp_path))
    assert choose_checkpoint(config_for(tmp_path, resume="auto")) == path


def test_changed_flags_are_told_from_the_manifest_alone(tmp_path):
    config = config_for(tmp_path, peft="bone", bone_r=16)
    record = {"config": dataclasses.asdict(config)}
    state = {"trained": {"a": torch.zeros(2)}, "adam_step": 1}
    path = save_checkpoint(tmp_path, 1, state, tensors_of(state), record)
    check_flags(path, dataclasses.replace(config, resume="auto", micro_bsz=2, proj_dir="other"))
    with pytest.raises(UserError, match=r"`bone_r` 16 -> 8; `random_seed` 42 -> 43"):
        check_flags(path, dataclasses.replace(config, bone_r=8, random_seed=43))


@pytest.mark.parametrize("kind", ["none", "state", "infctx"])
def test_a_checkpoint_from_before_train_type_took_several_words_is_resumed(tmp_path, kind):
    config = config_for(tmp_path, train_type=[] if kind == "none" else [kind])
    record = {"config": dataclasses.asdict(config) | {"train_type": kind}}
    state = {"trained": {"a": torch.zeros(2)}, "adam_step": 1}
    path = save_checkpoint(tmp_path, 1, state, tensors_of(state), record)
    check_flags(path, config)
    with pytest.raises(UserError, match=r"`train_type` .* -> "):
        check_flags(path, dataclasses.replace(config, train_type=["state", "infctx"]))


@pytest.mark.slow
def test_resuming_with_other_flags_or_data_is_refused_in_one_line(tmp_path):
    folder = make_folder(tmp_path)
    words = "--peft bone --bone_r 16 --micro_bsz 4 --epoch_steps 4 --save_every 2".split()
    train(*flags(folder, "run", *words))
    again = flags(folder, "run", *words, "--resume", "auto", "--epoch_count", 1)
    fewer = [word if word != "16" else "8" for word in map(str, again)]
    assert_one_error_line(run_script("train.py", *fewer), "--bone_r 16 -> 8")
    text = folder / "text.jsonl"
    lines = text.read_text().splitlines(keepends=True)
    text.write_text("".join(lines[::-1]))
    done = run_script("train.py", *again)
    assert_one_error_line(done, "edited or reordered (of the same sizes)", "--data_changed 1")
    train(*again, "--data_changed", 1)
    assert len(metrics(folder / "run")) == 4
    (manifest,) = (folder / "run" / "checkpoints").glob("step-4/manifest.json")
    assert json.loads(manifest.read_text())["content"]
