"""--plan: sizes by name or from the file, and what the steps read of the data."""

import json
import math
import re

import pytest
import torch
from helpers.support import assert_one_error_line, run_script, save_model, small_model

from finchtune.adapters import fp8
from finchtune.cli.flags import parse_train_flags
from finchtune.errors import UserError
from finchtune.ops.kernels import kernels_absent
from finchtune.training.plan import planned_sizes, print_plan
from finchtune.training.setup import open_data, planned_model


def planned(capsys, *words):
    print_plan(parse_train_flags(["--plan", *map(str, words)]))
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan")
    save_model(small_model(head_size=16), path / "base.pth")
    with (path / "text.jsonl").open("w") as file:
        for i in range(50):
            file.write(json.dumps({"text": "abc " * (1 + i % 7)}) + "\n")
    return path


def data_flags(folder, *more):
    return ["--load_model", folder / "base.pth", "--data_file", folder / "text.jsonl",
            "--data_type", "jsonl", "--ctx_len", 16, *more]  # fmt: skip


def test_a_released_size_is_planned_by_name_without_its_file(capsys):
    words = "--load_model 14B --peft bone --accelerator gpu --devices 8 --micro_bsz 4"
    text = planned(capsys, *words.split(), "--strategy", "deepspeed_stage_3")
    assert "L61 C4096 F14336 V65536" in text
    assert "trained      167,903,232" in text  # 61 blocks of 64 x (5 C + F + 2 C)
    row = next(line for line in text.splitlines() if "<- this run" in line)
    assert row.startswith("ZeRO 3")
    numbers = [int(word.replace(",", "")) for word in row.split()[3:10]]
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=3)


@pytest.mark.parametrize(
    ("name", "sizes", "trained"),
    [
        ("0.1B", "L12 C768 F3072 V65536, 12 heads", 12 * 8 * (5 * 768 + 3072)),
        ("13.3B", "L61 C4096 F16384 V65536, 64 heads", 61 * 8 * (5 * 4096 + 16384)),
    ],
)
def test_sizes_of_the_second_generation_are_planned_by_name(capsys, name, sizes, trained):
    words = f"--load_model {name} --peft bone --bone_r 8 --micro_bsz 1 --ctx_len 32".split()
    text = planned(capsys, *words, "--accelerator", "gpu", "--my_testing", "x070")
    assert sizes in text
    assert f"trained      {trained:,}" in text


def test_steps_and_documents_never_read_are_those_of_the_data(folder, capsys):
    words = data_flags(folder, "--micro_bsz", 3, "--epoch_steps", 5, "--epoch_count", 2)
    text = planned(capsys, *words)
    config = parse_train_flags(list(map(str, words)))
    data = open_data(config, 256)
    visited = {d for step in range(10) for d in data.document_ids(step, 0, 1, 3, 1)}
    assert f"never read   {50 - len(visited)} documents" in text
    assert "steps        10 = 5 x 2 epochs" in text
    assert f"2 rwkv-N.pth, 0 resumable checkpoints: {2 * 4 * 198_912 / 2**20:.2f} MiB" in text
    places = sum(min(16, 4 * (1 + i % 7)) for i in range(50))
    assert f"{1 - places / (50 * 16):.1%} of the positions" in text


def test_one_pass_reads_every_document(folder, capsys):
    text = planned(capsys, *data_flags(folder, "--micro_bsz", 4))
    assert f"steps        {math.ceil(50 / 4)} = " in text
    assert "never read   0 documents" in text


def test_labels_that_are_lost_are_told(folder, capsys):
    (folder / "mixed.jsonl").write_text(
        '{"text": "User: a\\n\\nAssistant: b"}\n{"text": "nobody speaks"}\n'
        '{"text": "User: a long question\\n\\nAssistant: b"}\n'
    )
    flags = ("--data_type", "jsonl", "--loss_mask", "qa", "--ctx_len", 24)
    text = planned(
        capsys, "--load_model", folder / "base.pth", "--data_file", folder / "mixed.jsonl", *flags
    )
    assert (
        "labels       2 of 3 documents train nothing: 1 have no trained token, 1 lose theirs to "
        "ctx_len 24" in text
    )
    assert "cut off      11 tokens of 1 documents longer than ctx_len 24, 3 of them" in text
    assert "ctx_len      35 keeps all trained tokens of 95% of the documents, 35 of all" in text


def test_chunks_take_their_own_memory_and_that_of_the_states_of_the_longest_document(
    folder, capsys
):
    """2 layers of 4 x 16 x 16 + 2 x 64 fp32 numbers, between 640 chunks and twice beside."""
    (folder / "long.jsonl").write_text('{"text": "abc"}\n{"text": "' + "abcd" * 10240 + '"}\n')
    common = ["--load_model", folder / "base.pth", "--data_file", folder / "long.jsonl"]
    common += "--data_type jsonl --peft bone --bone_r 8 --grad_cp 0".split()
    activations = []
    for words in ("--ctx_len 40960", "--ctx_len 16 --train_type infctx --chunk_ctx 64"):
        text = planned(capsys, *common, *words.split())
        row = next(line for line in text.splitlines() if "<- this run" in line)
        activations.append(int(row.split()[6].replace(",", "")))
        assert "at most 40,960 tokens" in text
        assert "1 x 40960 tokens" in text
    assert f"states between chunks, in MiB: {641 * 2 * 4 * (1024 + 128) / 2**20:.1f}" in text
    assert activations[1] < activations[0] / 20


@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_adapters_and_states_are_both_counted(folder, capsys, quant):
    """Bone's 2 x 8 x (7 C + F) numbers, and 2 layers of 4 x 16 x 16."""
    words = f"--peft bone --bone_r 8 --train_type state infctx --chunk_ctx 64 --quant {quant}"
    text = planned(capsys, "--load_model", folder / "base.pth", *words.split())
    assert re.search(r"trained +12,800 \(.*; bone and states\)\n +10,752 of adapters, 2,048 ", text)


def test_an_unknown_model_is_refused_with_the_known_names():
    with pytest.raises(UserError, match=r"`plan` also takes 1\.6B, 3B, 7B, 14B, 0\.1B, .*13\.3B"):
        planned_sizes("5B")


@pytest.mark.slow
def test_train_py_plans_and_leaves_nothing_behind(folder, tmp_path):
    done = run_script("train.py", *data_flags(folder), "--proj_dir", tmp_path / "out", "--plan")
    assert done.returncode == 0, done.stderr
    assert "<- this run" in done.stdout
    assert not (tmp_path / "out").exists()


def test_a_gpus_figures_are_those_of_its_kernels(capsys, kernels):
    """They save WKV's states in bf16, a CPU's in fp32: two of 64 rows for 64 tokens."""
    flags = "--load_model 1.6B --peft bone --ctx_len 64 --micro_bsz 1 --precision bf16".split()
    kept = []
    for accelerator in ("cpu", "gpu"):
        said = planned(capsys, *flags, "--accelerator", accelerator)
        kept.append(int(re.search(r"att ([\d,]+)", said)[1].replace(",", "")))
    assert kept[1] == kept[0] - 2 * 2 * 64 * 2048 // 64


def test_graphs_are_planned_where_there_can_be_any(capsys):
    """Recomputing whole blocks, with whole weights."""

    def totals(*words):
        flags = (
            "--load_model 1.6B --peft bone --ctx_len 128 --micro_bsz 8 --accelerator gpu".split()
        )
        row = re.compile(r"^(ZeRO .*?) +([012]) .*?([\d,]+)  (?:forward|optimizer)", re.MULTILINE)
        return {(x[1], x[2]): x[3] for x in row.finditer(planned(capsys, *flags, *words))}

    without, with_graphs = totals(), totals("--cuda_graphs", 1)
    grown = {row for row, total in without.items() if with_graphs[row] != total}
    assert len(without) == 18
    assert grown == {(f"ZeRO {stage}", "1") for stage in ("0", "1", "2", "2 offload")}


def test_a_plan_refuses_what_the_gpu_here_refuses(monkeypatch):
    """One without products in fp8, on a machine that has compiled no kernels for it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    monkeypatch.setattr(fp8, "can_multiply", lambda device: False)
    flags = "--load_model 1.6B --peft bone --accelerator gpu --plan".split()
    with pytest.raises(UserError, match="A100 has no products in fp8"):
        print_plan(parse_train_flags([*flags, "--quant", "fp8_compute"]))
    graphs = parse_train_flags([*flags, "--cuda_graphs", "1"])
    with kernels_absent(), pytest.raises(UserError, match="needs the compiled GPU kernels"):
        print_plan(graphs)


def test_a_plan_of_graphs_names_no_machine_that_has_none(capsys, kernels):
    flags = "--load_model 1.6B --peft bone --ctx_len 128 --accelerator gpu --cuda_graphs 1".split()
    said = planned(capsys, *flags)
    assert "nvcc" not in said
    assert "without which `cuda_graphs` is refused" in said


def test_a_plan_says_which_operators_it_counts(capsys, kernels):
    """A GPU elsewhere may have none that are compiled: then as much as this plan says."""
    flags = "--load_model 1.6B --peft bone --ctx_len 512 --micro_bsz 4 --accelerator gpu".split()
    said = planned(capsys, *flags)
    elsewhere = re.search(r"takes ([\d,]+) MiB on a GPU machine without nvcc", said)[1]
    with kernels_absent():
        plain = planned(capsys, *flags)
    assert "counted in plain torch" in plain
    total = re.compile(r"([\d,]+)  forward and backward  <- this run")
    assert total.search(plain)[1] == elsewhere != total.search(said)[1]


@pytest.mark.parametrize("method", ["--train_type state", "--peft bone --bone_r 8"])
@pytest.mark.parametrize("part", ["ffn", "ffn.key"])
def test_parts_whose_weights_are_quantised_are_refused(folder, method, part):
    words = f"--plan --quant nf4 {method} --train_parts time_maa {part}"
    config = parse_train_flags([*map(str, data_flags(folder)), *words.split()])
    with pytest.raises(UserError, match=rf"{part}: blocks\.0\.ffn\.key\.weight is quantised"):
        planned_model(config, planned_sizes(config.load_model), torch.float32)
    config.train_parts.pop()
    model = planned_model(config, planned_sizes(config.load_model), torch.float32)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "blocks.0.ffn.time_maa_k" in trained


@pytest.mark.parametrize(
    "words",
    [
        "--peft bone --bone_r 8 --train_parts nonsense",
        "--peft bat --bat_r 8 --train_parts att.key",
        "--train_type state --quant nf4 --train_parts ffn",
        "--precision fp16 --accelerator cpu",
        "--peft bat --bat_r 7",
        "--n_embd 65",
    ],
)
def test_a_plan_refuses_what_training_refuses(words, tmp_path):
    save_model(small_model(), tmp_path / "base.pth")
    (tmp_path / "d.jsonl").write_text('{"text": "some words"}\n')
    flags = ("--load_model", tmp_path / "base.pth", "--data_file", tmp_path / "d.jsonl")
    common = ("--data_type", "jsonl", "--tokenizer", "bytes", "--proj_dir", tmp_path / "out")
    trained, planned = (
        run_script("train.py", *flags, *common, *words.split(), *more) for more in ((), ("--plan",))
    )
    assert_one_error_line(trained)
    assert planned.returncode == trained.returncode
    assert planned.stderr == trained.stderr
