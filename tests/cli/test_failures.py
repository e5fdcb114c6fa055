"""What is refused, kept, removed and said when files, numbers or memory go wrong."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess

import pytest
import torch

from finchtune.cli import failures
from finchtune.cli.flags import parse_train_flags
from finchtune.config import TrainConfig
from finchtune.errors import NotFinite, UserError
from finchtune.files import atomic_path, require_space, sha256
from finchtune.training.checkpoints import (
    checkpoint_problem,
    checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from finchtune.training.run_folder import choose_checkpoint, clean_folder
from finchtune.weights.pth import tensors_of
from finchtune.weights.tensors import write_tensors


def save(folder, step, keep_last=0, value=1.0):
    state = {"trained": {"a": torch.full((8,), value)}, "adam_step": step}
    return save_checkpoint(folder, step, state, tensors_of(state), {"config": {}}, keep_last)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def config(folder, **changes):
    return TrainConfig(load_model="m", data_file="d", proj_dir=str(folder), **changes)


def test_keep_last_keeps_the_newest_and_what_was_just_written(tmp_path):
    for step in (2, 4, 6, 10):
        save(tmp_path, step, keep_last=2)
    assert names(tmp_path) == ["step-10", "step-6"]
    save(tmp_path, 3, keep_last=1)  # gone back to an earlier step
    assert names(tmp_path) == ["step-3"]
    for step in (4, 5, 6):
        save(tmp_path, step)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-6", "step-5", "step-4", "step-3"]


def test_a_step_saved_again_replaces_the_earlier_one_whole(tmp_path):
    save(tmp_path, 2, value=1.0)
    save(tmp_path, 2, value=2.0)
    assert names(tmp_path) == ["step-2"]
    assert load_checkpoint(tmp_path / "step-2")[0]["trained"]["a"][0] == 2


def test_bad_numbers_never_replace_a_good_checkpoint(tmp_path):
    save(tmp_path, 2)
    with pytest.raises(NotFinite, match="trained of a holds NaN"):
        save(tmp_path, 2, keep_last=1, value=float("inf"))
    assert names(tmp_path) == ["step-2"]
    assert checkpoint_problem(tmp_path / "step-2") is None


def test_a_run_removes_what_killed_ones_left_half_written(tmp_path):
    left = f"finchtune-{'a' * 16}.tmp"
    for place in (tmp_path, tmp_path / "checkpoints", tmp_path / "data_cache"):
        place.mkdir(exist_ok=True)
        (place / f".x.{left}").mkdir()
        (place / ".hidden").touch()
    clean_folder(tmp_path, overwrite=False)
    assert names(tmp_path) == [".hidden", "checkpoints", "data_cache"]
    assert names(tmp_path / "checkpoints") == names(tmp_path / "data_cache") == [".hidden"]


def seal(path):
    """Give a changed manifest its checksum."""
    digest = sha256(path / "manifest.json")
    (path / "manifest.sha256").write_text(f"{digest}  manifest.json\n")


def test_manifests_must_vouch_for_the_state(tmp_path):
    path = save(tmp_path, 2)
    manifest = json.loads((path / "manifest.json").read_text())
    for digests in ({}, {"../../secret": "0"}, {"state.pth": "0"}, "no dict"):
        (path / "manifest.json").write_text(json.dumps(manifest | {"sha256": digests}))
        seal(path)
        assert checkpoint_problem(path)
    assert newest_checkpoint(tmp_path)[0] is None


def test_every_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = save(tmp_path, 2)
    assert checkpoint_problem(path) is None
    generator = random.Random(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        places = range(8 * len(whole)) if len(whole) < 200 else None
        for place in places or generator.sample(range(8 * len(whole)), 200):
            damaged = bytearray(whole)
            damaged[place // 8] ^= 1 << place % 8
            file.write_bytes(damaged)
            assert checkpoint_problem(path), (file, place)
        file.write_bytes(whole)
    assert checkpoint_problem(path) is None


def test_folder_manifest_and_optimizer_agree_on_the_step(tmp_path):
    path = save(tmp_path, 2)
    path.rename(tmp_path / "step-20")
    assert "its manifest is of step 2" in checkpoint_problem(tmp_path / "step-20")
    (tmp_path / "step-20").rename(tmp_path / "kept")
    assert checkpoint_problem(tmp_path / "kept") is None
    manifest = json.loads((tmp_path / "kept" / "manifest.json").read_text())
    manifest["optimizer_step"] = 3
    (tmp_path / "kept" / "manifest.json").write_text(json.dumps(manifest))
    seal(tmp_path / "kept")
    with pytest.raises(UserError, match=r"made 2 steps in state\.pth but 3 in manifest\.json"):
        load_checkpoint(tmp_path / "kept")


def test_code_in_a_checkpoint_is_refused(tmp_path):
    path = save(tmp_path, 2)
    torch.save({"trained": print}, path / "state.pth")
    with pytest.raises(UserError, match="refused"):
        load_checkpoint(path)


@pytest.fixture(params=["tmpfs", "limit"])
def full_disk(request, tmp_path):
    """A folder in which files of more than about a megabyte cannot be written."""
    folder = tmp_path / "small"
    folder.mkdir()
    if request.param == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root may mount a small file system")
        yield folder
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    else:
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        yield folder
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_keeps_what_was_there_and_says_so(full_disk):
    path = full_disk / "a.pth"
    write_tensors({"a": torch.zeros(9)}, path)
    for large in (torch.zeros(1 << 19), torch.zeros(1 << 23)):
        with pytest.raises(UserError, match=r"a\.pth: the disk is full"):
            write_tensors({"a": large}, path)
    with pytest.raises(UserError, match="the disk is full"), atomic_path(path) as temporary:
        temporary.write_bytes(bytes(1 << 21))
    assert names(full_disk) == ["a.pth"]
    assert torch.equal(torch.load(path)["a"], torch.zeros(9))


def test_free_space_is_looked_at_first(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path, free // 2)
    with pytest.raises(UserError, match="are needed but only"):
        require_space(tmp_path, 2 * free)


def test_folders_that_are_refused(tmp_path):
    place = tmp_path / "place"
    assert choose_checkpoint(config(place)) is None
    place.mkdir()
    (place / "slurm.out").touch()
    assert choose_checkpoint(config(place)) is None
    (place / "novel.txt").touch()
    with pytest.raises(UserError, match=r"files that are no run's, such as novel\.txt"):
        choose_checkpoint(config(place))
    assert choose_checkpoint(config(place, overwrite=True)) is None
    clean_folder(place, overwrite=True)
    assert names(place) == ["novel.txt", "slurm.out"], "what is not the run's stays"
    with pytest.raises(UserError, match="is a file"):
        choose_checkpoint(config(place / "novel.txt"))
    (tmp_path / "link").symlink_to(place)
    with pytest.raises(UserError, match=r"is a link to .*place"):
        choose_checkpoint(config(tmp_path / "link"))
    run = tmp_path / "run"
    run.mkdir()
    (run / "checkpoints").symlink_to(place)
    with pytest.raises(UserError, match="is a link"):
        choose_checkpoint(config(run, overwrite=True))


def test_what_resume_finds(tmp_path, capsys):
    auto = config(tmp_path, resume="auto")
    assert choose_checkpoint(auto) is None
    assert "there is no checkpoint" in capsys.readouterr().out
    path = save(tmp_path / "checkpoints", 5)
    assert choose_checkpoint(auto) == path
    with pytest.raises(UserError, match="already holds a run"):
        choose_checkpoint(config(tmp_path))
    with pytest.raises(UserError, match="choose one"):
        choose_checkpoint(config(tmp_path, resume="auto", overwrite=True))
    with pytest.raises(UserError, match="no such checkpoint"):
        choose_checkpoint(config(tmp_path, resume="nowhere"))
    with (path / "state.pth").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(UserError, match=r"no checkpoint in .* is intact"):
        choose_checkpoint(auto)
    with pytest.raises(UserError, match=r"state\.pth \(100 bytes\) does not match"):
        choose_checkpoint(config(tmp_path, resume=str(path)))


def test_no_memory_is_explained_with_three_remedies():
    config = TrainConfig(load_model="m", data_file="d", micro_bsz=6)
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        told = failures.explain(error, config)
    assert told is not None
    assert told.status == 4
    for part in (
        "--micro_bsz 3 --accumulate_grad_batches 2",
        "_offload",
        "MB",
        "tried to allocate",
    ):
        assert part in str(told), told
    assert failures.explain(ValueError("something else"), config) is None
    offload = "--precision bf16 --strategy deepspeed_stage_3_offload"
    for peft, words in (("none", "--grad_cp 1"), ("bone", offload)):
        flags = f"--load_model m --data_file d --peft {peft} {words}".split()
        smallest = parse_train_flags(flags)
        assert len(failures.flags_that_lower_memory(smallest)) >= 3


@pytest.mark.parametrize(
    ("words", "advised"),
    [
        ("--train_type state --micro_bsz 4", "--train_type state infctx"),
        ("--peft bone --strategy deepspeed_stage_3_offload", "--train_type infctx"),
        ("--cuda_graphs 1", "--cuda_graphs 0"),
        ("--cuda_graphs 1 --train_type state", "--strategy deepspeed_stage_2_offload"),
        ("--cuda_graphs 1 --peft bone --strategy deepspeed_stage_2_offload", "--cuda_graphs 0"),
    ],
)
def test_what_no_memory_advises_is_taken_and_trains_the_same(words, advised):
    words = f"--load_model m --data_file d --precision bf16 --ctx_len 4096 {words}".split()
    config = parse_train_flags(words)
    advice = failures.flags_that_lower_memory(config)
    assert advised in advice
    for flags in set(advice) - {"a smaller --load_model"}:
        given = flags.replace("more --devices under", "--devices 2").removesuffix(" (same batch)")
        changed = parse_train_flags([*words, *given.split()])
        assert changed.trained == config.trained or "--peft" in flags
