"""train.py for states and long contexts: alone, in several processes, resumed."""

import json
import shutil

import pytest
import torch
from helpers.additions import flags, losses, make_folder
from helpers.support import assert_one_error_line, relative_error, run_script, train

from finchtune.files import sha256
from finchtune.weights.base import load_model
from finchtune.weights.merging import merge_files
from finchtune.weights.state_files import set_states
from finchtune.weights.tensors import read_tensors
from finchtune.weights.writing import writing_model

ROWS = "--micro_bsz 4 --accumulate_grad_batches 2 --epoch_steps 4".split()
BONE = [*ROWS, "--peft", "bone", "--bone_r", 8]
THREEFOLD = [*BONE, *"--train_type state infctx --lr_state 0.05 --chunk_ctx 32".split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With long.jsonl: documents of up to 300 tokens, each of several of text.jsonl."""
    made = make_folder(tmp_path_factory.mktemp("contexts"))
    texts = [json.loads(line)["text"] for line in (made / "text.jsonl").read_text().splitlines()]
    longer = [" ".join(texts[i : i + 1 + i % 9]) for i in range(len(texts))]
    lines = [json.dumps({"text": text}) for text in longer]
    (made / "long.jsonl").write_text("\n".join(lines) + "\n")
    return made


@pytest.fixture(scope="module")
def chunked_run(folder):
    """A finished run over whole documents in chunks, with a checkpoint half-way."""
    words = [*BONE, "--train_type", "infctx", "--chunk_ctx", 32, "--save_every", 2]
    train(*flags(folder, "chunked", *words, data="long.jsonl"))
    return folder / "chunked"


def test_states_alone_are_trained_saved_merged_and_used(folder):
    words = [*ROWS, "--train_type", "state", "--lr_init", "0.1", "--lr_final", "0.01"]
    done = train(*flags(folder, "state", *words))
    assert "0.00 M trained" in done.stdout
    path = folder / "state/rwkv-0.pth"
    tensors = read_tensors(path)
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"blocks.{i}.att.time_state": (4, 16, 16) for i in range(2)
    }
    assert path.stat().st_size < 20_000
    assert losses(folder / "state")[-1] < losses(folder / "state")[0]
    merged = folder / "with-state.pth"
    merge_files(folder / "base.pth", path, merged, methods=("state",))
    model = load_model(folder / "base.pth")
    set_states(model, path)
    tokens = torch.randint(1, 256, (1, 30))
    assert torch.equal(load_model(merged)(tokens)[0], model(tokens)[0])
    # From its file on, with the same flags.
    again = [*words, "--peft_load", path, "--lr_init", "0.01"]
    train(*flags(folder, "state-again", *again))
    assert losses(folder / "state-again")[0] < losses(folder / "state")[0]


@pytest.fixture(scope="module")
def threefold(folder):
    """An adapter and states trained on whole documents in chunks, with a checkpoint half-way."""
    done = train(*flags(folder, "threefold", *THREEFOLD, "--save_every", 2, data="long.jsonl"))
    assert "trained (bone and states)" in done.stdout
    return folder / "threefold"


def test_an_adapter_and_states_on_long_contexts_in_one_run(folder, threefold):
    tensors = read_tensors(threefold / "rwkv-0.pth")
    kinds = [name.rpartition(".")[2] for name in tensors]
    assert (kinds.count("bone"), kinds.count("time_state"), len(kinds)) == (16, 2, 18)
    assert losses(threefold)[-1] < losses(threefold)[0]
    merged = folder / "threefold.pth"
    receipt = merge_files(folder / "base.pth", threefold / "rwkv-0.pth", merged)
    assert (receipt["method"], receipt["merged"], receipt["replaced"]) == ("bone", 16, 2)
    unmerged = writing_model(folder / "base.pth", threefold / "rwkv-0.pth")
    tokens = torch.randint(1, 256, (1, 30))
    assert relative_error(load_model(merged)(tokens)[0], unmerged(tokens)[0]) < 1e-5
    alone = load_model(folder / "base.pth")
    set_states(alone, threefold / "rwkv-0.pth")
    states = alone.initial_states()
    assert states.keys() == unmerged.initial_states().keys()
    assert all(torch.equal(s, unmerged.initial_states()[name]) for name, s in states.items())


@pytest.mark.slow
def test_an_adapter_and_states_train_in_chunks_as_on_long_rows(folder, threefold):
    words = [*BONE, "--train_type", "state", "--lr_state", "0.05", "--ctx_len", 512]
    train(*flags(folder, "both", *words, data="long.jsonl"))
    assert losses(threefold) == pytest.approx(losses(folder / "both"), rel=1e-5)
    found, expected = (read_tensors(p / "rwkv-0.pth") for p in (threefold, folder / "both"))
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) < 1e-3, name
    parts = ("--base_model", folder / "base.pth", "--output", folder / "both.pth")
    done = run_script(
        "merge/merge.py",
        *(*parts, "--peft_checkpoint", folder / "both/rwkv-0.pth", "--verify", "What is 2 plus 2?"),
    )
    assert done.returncode == 0, done.stderr
    assert "16 tensors merged, 2 tensors replaced" in done.stdout


STATES = [*ROWS, "--lr_init", "0.1", "--train_type", "state"]


@pytest.mark.parametrize("kind", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_states_are_trained_on_a_quantised_base(folder, kind):
    """To the file that goes with the base as it is, on which they lower the loss as well."""
    name = f"state-{kind}"
    train(*flags(folder, name, *STATES, "--quant", kind, "--sample_prompt", "What is"))
    assert losses(folder / name)[-1] < losses(folder / name)[0]
    path = folder / name / "rwkv-0.pth"
    assert {n.rpartition(".")[2] for n in read_tensors(path)} == {"time_state"}
    text = (folder / "text.jsonl").read_text().encode()[:400]
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[None]
    model = load_model(folder / "base.pth")
    before = model.loss(tokens[:, :-1], tokens[:, 1:])[0].item()
    set_states(model, path)
    assert model.loss(tokens[:, :-1], tokens[:, 1:])[0].item() < before


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        [*BONE, "--train_type", "state", "--lr_state", "0.05"],
        [*STATES, "infctx", "--chunk_ctx", 32],
        THREEFOLD,
        [*THREEFOLD, "--quant", "fp8"],
        [*STATES, "--quant", "nf4"],
    ],
    ids=lambda words: "".join(map(str, words[6:])),
)
def test_every_combination_resumes_to_the_same_bits(folder, tmp_path, words):
    """In one process, and on to another ZeRO stage in two with the same losses."""
    words = [*words, "--save_every", 2]
    train(*flags(folder, tmp_path / "whole", *words, data="long.jsonl"))
    for name in ("again", "other"):
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        shutil.rmtree(tmp_path / name / "checkpoints/step-4")
        (tmp_path / name / "rwkv-0.pth").unlink()
    resume = [*words, "--resume", "auto"]
    train(*flags(folder, tmp_path / "again", *resume, data="long.jsonl"))
    files = [tmp_path / name / "rwkv-0.pth" for name in ("whole", "again")]
    assert sha256(files[0]) == sha256(files[1])
    other = [*resume, "--devices", 2, "--micro_bsz", 2, "--strategy", "deepspeed_stage_3"]
    train(*flags(folder, tmp_path / "other", *other, data="long.jsonl"))
    assert losses(tmp_path / "other") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


@pytest.mark.slow
def test_a_rash_rate_is_warned_of_and_a_lost_flag_refused(folder):
    words = ["--epoch_steps", 1, "--lr_init", 1]
    done = run_script("train.py", *flags(folder, "lost", *words))
    assert_one_error_line(done, "--train_type state")
    words = ["--epoch_steps", 1, "--train_type", "state"]
    for rate, warned in ((20, True), (1, False)):
        done = train(*flags(folder, f"rate{rate}", *words, "--lr_init", rate))
        assert (f"warning: a learning rate of {rate} for states" in done.stdout) == warned


@pytest.mark.slow
def test_chunks_of_whole_documents_train_as_long_rows_do(folder, chunked_run):
    train(*flags(folder, "long-rows", *BONE, "--ctx_len", 512, data="long.jsonl"))
    assert losses(chunked_run) == pytest.approx(losses(folder / "long-rows"), rel=1e-5)
    found, expected = (read_tensors(folder / p / "rwkv-0.pth") for p in ("chunked", "long-rows"))
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) < 1e-3, name


@pytest.mark.slow
def test_a_chunked_run_resumes_to_the_same_bits(folder, chunked_run):
    proj = folder / "chunked-resumed"
    shutil.copytree(chunked_run, proj)
    shutil.rmtree(proj / "checkpoints/step-4")
    (proj / "rwkv-0.pth").unlink()
    words = [*BONE, "--train_type", "infctx", "--chunk_ctx", 32, "--save_every", 2]
    train(*flags(folder, proj, *words, "--resume", "auto", data="long.jsonl"))
    assert sha256(proj / "rwkv-0.pth") == sha256(chunked_run / "rwkv-0.pth")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        "--devices 2 --micro_bsz 2 --strategy deepspeed_stage_2",
        "--devices 2 --micro_bsz 2 --strategy deepspeed_stage_3",
        "--devices 2 --context_parallel 2",
        "--devices 2 --context_parallel 2 --strategy deepspeed_stage_3",
        "--dataload pad --devices 1 --infctx_offload 1 --grad_cp 0",
    ],
)
def test_other_processes_and_stages_give_the_same_losses(folder, chunked_run, words):
    proj = folder / "".join(words.split())
    common = [*BONE, "--train_type", "infctx", "--chunk_ctx", 32]
    train(*flags(folder, proj, *common, *words.split(), data="long.jsonl"))
    assert losses(proj) == pytest.approx(losses(chunked_run), rel=1e-5)


@pytest.mark.slow
def test_packed_rows_of_whole_contexts_are_shared(folder):
    for name, words in (("one", ""), ("two", "--devices 2 --context_parallel 2")):
        common = [*BONE, "--dataload", "pack", "--ctx_len", 128, *words.split()]
        train(*flags(folder, f"shared-{name}", *common, data="long.jsonl"))
    assert losses(folder / "shared-two") == pytest.approx(losses(folder / "shared-one"), rel=1e-5)


@pytest.mark.slow
def test_truncated_runs_and_states_in_long_contexts(folder):
    words = [*ROWS, "--peft", "state", "--train_type", "infctx", "--chunk_ctx", 32]
    for bptt in ("exact", "truncated"):
        train(*flags(folder, bptt, *words, "--bptt", bptt, data="long.jsonl"))
    first, other = losses(folder / "exact"), losses(folder / "truncated")
    assert first[0] == pytest.approx(other[0], rel=1e-5)
    assert first[1:] != pytest.approx(other[1:], rel=1e-6)
    assert first[-1] < first[0]


@pytest.mark.slow
def test_processes_that_cannot_share_are_refused(folder):
    words = ["--devices", 2, "--context_parallel", 3]
    assert_one_error_line(
        run_script("train.py", *flags(folder, "three", *words)), "does not divide"
    )
