"""train.py for states and long contexts: alone, in several processes, resumed."""

import json
import shutil

import pytest
import torch
from helpers.additions import flags, losses, make_folder
from helpers.support import assert_one_error_line, relative_error, run_script, train

from finchtune.data.binidx import BinIdxWriter
from finchtune.files import sha256
from finchtune.weights.base import load_model
from finchtune.weights.merging import merge_files
from finchtune.weights.state_files import set_states
from finchtune.weights.tensors import read_tensors

ROWS = "--micro_bsz 4 --accumulate_grad_batches 2 --epoch_steps 4".split()
BONE = [*ROWS, "--peft", "bone", "--bone_r", 8]


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


@pytest.mark.slow
def test_states_beside_an_adapter(folder):
    train(*flags(folder, "both", *BONE, "--train_type", "state", "--lr_state", "0.05"))
    kinds = {name.rpartition(".")[2] for name in read_tensors(folder / "both/rwkv-0.pth")}
    assert kinds == {"bone", "time_state"}
    parts = ("--base_model", folder / "base.pth", "--output", folder / "both.pth")
    done = run_script(
        "merge/merge.py",
        *(*parts, "--peft_checkpoint", folder / "both/rwkv-0.pth", "--verify", "What is 2 plus 2?"),
    )
    assert done.returncode == 0, done.stderr
    assert "16 tensors merged, 2 tensors replaced" in done.stdout


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


PUBLISHED = (
    "--n_layer 2 --n_embd 64 --vocab_size 256 --ctx_len 64 --micro_bsz 2 --epoch_steps 2 "
    "--epoch_count 1 --epoch_begin 0 --epoch_save 1 --warmup_steps 10 --beta1 0.9 --beta2 0.99 "
    "--adam_eps 1e-8 --accelerator cpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 "
    "--grad_cp 1 --compat rwkv-peft"
)
OLD = "--data_type binidx --pre_ffn 0 --head_qk 0 --my_testing x060 --dataload pad"
STATE = "--lr_init 1 --lr_final 1e-2"
BONE_CONFIG = '--bone_config {"bone_mode":"bone","bone_load":"","bone_r":16}'
INFCTX = "--train_type infctx --chunk_ctx 32 --lr_init 2e-5 --lr_final 2e-5"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        (f"{OLD} --loss_mask pad --train_type state {STATE}", {"time_state"}),
        (f"{OLD} --loss_mask pad --state_tune --fla {STATE}", {"time_state"}),
        (
            f"--data_type sft --sft_field question answer --sft_split train --data_shuffle 0 "
            f"--ctx_len 256 --op fla --train_type state {STATE}",
            {"time_state"},
        ),
        (f"{OLD} {INFCTX} --train_parts [] --peft bone {BONE_CONFIG}", {"bone"}),
        (f"{OLD} {INFCTX} --peft bone {BONE_CONFIG} --strategy deepspeed_stage_2", {"bone", "ln"}),
        (
            f"{OLD} {INFCTX} --train_parts [] --lora --lora_r 8 --lora_alpha 128 --lora_dropout "
            "0.01 --lora_parts=att,ffn --lora_load rwkv-0",
            {"lora_A", "lora_B"},
        ),
        (f"{OLD} {INFCTX}", {"emb"}),
    ],
)
def test_lines_written_for_rwkv_peft_train(folder, tmp_path, words, kinds):
    """Rebuilt from the flags and values of published ones, small."""
    data, out = folder / "text.jsonl", tmp_path / "out"
    if "binidx" in words:
        data = tmp_path / "text"
        with BinIdxWriter(data, "uint16") as writer:
            for i in range(8):
                writer.add(torch.randint(1, 256, (40 + 20 * i,)).numpy())
    common = ("--load_model", folder / "base.pth", "--proj_dir", out, "--data_file", data)
    done = train(*common, *PUBLISHED.split(), *words.split())
    assert "meanings and defaults" in done.stdout
    found = {part for name in read_tensors(out / "rwkv-0.pth") for part in name.split(".")}
    assert {kind for kind in kinds if any(kind in part for part in found)} == kinds
    assert ("time_state" in found) == ("time_state" in kinds)
    assert len(losses(out)) == 2
