"""Command lines written for RWKV-PEFT: what runs, what is refused, and what each means here."""

import dataclasses
import json

import pytest

from finchtune.cli.flags import FIELDS, parse_command_line, parse_train_flags
from finchtune.cli.spellings.compat import as_rwkv_peft, optimizer_steps
from finchtune.cli.spellings.rwkv_peft import FLAGS
from finchtune.errors import ConfigurationError

COMMON = (
    "--load_model m.pth --proj_dir out --data_file d --vocab_size 65536 --n_layer 24 --n_embd 2048 "
    "--ctx_len 512 --micro_bsz 4 --epoch_steps 200 --epoch_count 2 --epoch_begin 0 --epoch_save 1 "
    "--lr_init 5e-5 --lr_final 2e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 "
    "--accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 "
).split()
OLD = "--my_testing x060 --pre_ffn 0 --head_qk 0 --data_type binidx --dataload pad".split()
LORA = "--lora --lora_r 8 --lora_alpha 16 --lora_dropout 0.01 --lora_load rwkv-0".split()
PARTS = ["--lora_parts=att,ffn,time,ln"]
SFT = "--data_type sft --sft_field query response --sft_split train".split()


def config_json(**values) -> str:
    return json.dumps(values, separators=(",", ":"))


BONE = ["--peft", "bone", "--bone_config", config_json(bone_mode="bone", bone_load="", bone_r=16)]
RUNS = {
    "full": (OLD, {"peft": "none"}),
    "lora of 2024": (
        OLD + LORA + PARTS, {"peft": "lora", "lora_r": 8, "train_parts": ["time", "ln"]}
    ),
    "pissa of 2024": (
        OLD + LORA + PARTS + ["--PISSA", "--svd_niter", "4"],
        {"peft": "pissa", "pissa_r": 8, "svd_niter": 4, "peft_load": ""},
    ),
    "nf4": ([*OLD, *LORA, *PARTS, "--quant", "nf4"], {"peft": "lora", "quant": "nf4"}),
    "fp4": ([*OLD, *LORA, *PARTS, "--quant", "fp4"], {"peft": "lora", "quant": "fp4"}),
    "accumulation": ([*OLD, *LORA, "--accumulate_grad_batches", "8"], {"peft": "lora"}),
    "stage 2": (
        [*OLD, *LORA, "--strategy", "deepspeed_stage_2"], {"strategy": "deepspeed_stage_2"}
    ),
    "lora_config": (
        ["--peft", "lora", "--lora_config",
         config_json(lora_load="", lora_r=32, lora_alpha=32, lora_dropout=0.0)],
        {"peft": "lora", "lora_r": 32, "lora_alpha": 32.0},
    ),
    "lora_config with parts": (
        ["--lora_config", config_json(lora_r=8, lora_alpha=32, lora_parts="att,ffn,ln")],
        {"peft": "lora", "train_parts": ["ln"]},
    ),
    "lora on att": (
        [*OLD, *LORA, "--lora_parts=att,time"],
        {"peft": "lora", "target": ["att"], "train_parts": ["time"]},
    ),
    "lora_config on ffn": (
        ["--lora_config", config_json(lora_r=8, lora_alpha=32, lora_parts="ffn")],
        {"peft": "lora", "target": ["ffn"], "train_parts": []},
    ),
    "pissa_config": (
        ["--peft", "pissa", "--pissa_config",
         config_json(pissa_load="", pissa_init="", pissa_r=32, svd_niter=4, pissa_parts="att,ffn")],
        {"peft": "pissa", "pissa_r": 32, "train_parts": []},
    ),
    "bone": (OLD + BONE, {"peft": "bone", "bone_r": 16}),
    "bone, quantised": ([*OLD, *BONE, "--quant", "int8"], {"quant": "int8"}),
    "disha": (
        ["--peft", "disha", "--disha_config", config_json(mode="bone", load="", r=16)],
        {"peft": "bone", "bone_r": 16},
    ),
    "miss": (["--peft", "miss", "--peft_config", config_json(r=8)], {"peft": "bone", "bone_r": 8}),
    "peft's lora": (
        ["--peft", "lora", "--peft_config", config_json(r=8, lora_alpha=32, lora_dropout=0.05)],
        {"peft": "lora", "lora_r": 8, "lora_alpha": 32.0, "lora_dropout": 0.05},
    ),
    "sft": (
        [*BONE, *SFT, "--train_parts", "[]", "--data_shuffle", "0", "--wandb", ""],
        {"data_type": "sft", "sft_field": ["query", "response"], "train_parts": []},
    ),
    "states of 2024": (
        [*OLD, "--state_tune", "--lr_init", "1", "--lr_final", "1e-2"],
        {"train_type": ["state"], "peft": "none", "lr_init": 1.0, "trains_all": False},
    ),
    "states": (
        [*SFT, "--train_type", "state", "--lr_init", "1", "--dataload", "only", "--micro_bsz", "1"],
        {"train_type": ["state"], "trains_state": True, "adapter": "none"},
    ),
    "states, quantised": (
        [*OLD, "--train_type", "state", "--lr_init", "1", "--quant", "int8"],
        {"quant": "int8", "trains_state": True, "adapter": "none"},
    ),
    "infctx": (
        [*OLD, *BONE, "--train_type", "infctx", "--chunk_ctx", "512", "--ctx_len", "16384"],
        {"train_type": ["infctx"], "chunk_ctx": 512, "peft": "bone", "bptt": "exact"},
    ),
    "harmless": (
        [*BONE, "--fla", "--op", "fla", "--ds_bucket_mb", "200", "--enable_progress_bar", "False",
         "--my_pile_edecay", "0", "--magic_prime", "2926181", "--my_exit_tokens", "1498226207",
         "--merge", "0", "--dropout", "0.0", "--num_nodes", "1", "--head_size_a", "64"],
        {"peft": "bone"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_their_command_lines_run(name):
    words, expected = RUNS[name]
    config = parse_train_flags(COMMON + words)
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--sft_split train[:1000]", "--sft_split train[:1000] cannot be honoured: point --data_f"),
        ("--LISA", "--LISA cannot be honoured: LISA is not available"),
        ("--merge 1", "--merge 1 cannot be honoured: merge after training, with merge/merge.py"),
        ("--pre_ffn 1", "--pre_ffn 1 cannot be honoured"),
        ("--my_pile_stage 3", "--my_pile_stage 3 cannot be honoured: give the run's length"),
        ("--loss_mask se", "--loss_mask se: choose one of none, pad, qa; for other marks"),
        ("--lora_parts time,ln", "--lora_parts time,ln: adapters sit on att or ffn; name one"),
        ("--lora_parts att,ffn,xyz", "--lora_parts: unknown part 'xyz'"),
        ("--lora --peft bone", "--lora means --peft lora, but --peft bone is given"),
        ("--peft_config {}", "--peft_config goes with --peft lora, bone or miss"),
        ('--bone_config {"bone_r":16}--wandb x', "a space is missing before the next flag"),
        ('--mask_id {"mask0":"<a>"}--peft bone', "--mask_id is not JSON"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_remedy(words, line):
    with pytest.raises(ConfigurationError) as caught:
        parse_train_flags(COMMON + words.split())
    assert any(line in found for found in caught.value.lines), caught.value.lines


def test_all_reasons_are_told_together():
    words = "--LISA --merge 1 --sft_split test --quant q4 --optim lion --unheard_of 1".split()
    with pytest.raises(ConfigurationError) as caught:
        parse_train_flags(COMMON + words)
    told = {line.split()[0].strip("-,;:") for line in caught.value.lines}
    assert told == {"unknown", "LISA", "merge", "sft_split", "quant", "optim"}


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ("--state_tune", ["state"]),
        ("--train_type state", ["state"]),
        ("--state_tune --train_type none", ["state"]),
        ("--state_tune --train_type infctx", ["state", "infctx"]),
    ],
)
def test_states_never_become_full_tuning(words, kinds):
    config = parse_train_flags([*COMMON, *words.split(), "--lr_init", "1"])
    assert (config.train_type, config.trains_all) == (kinds, False)


def test_an_adapter_is_loaded_where_there_is_one(tmp_path):
    path = tmp_path / "rwkv-0"
    words = [*COMMON, "--lora", "--lora_alpha", "16", "--lora_load", str(path)]
    config, told = parse_command_line(words)
    assert config.peft_load == ""
    assert f"  --lora_load {path}: no such file; a fresh adapter, as there" in told
    path.write_bytes(b"")
    assert parse_train_flags(words).peft_load == str(path)


def test_a_spelling_of_theirs_prints_what_differs_and_ours_does_not():
    assert parse_command_line([*COMMON, "--peft", "bone"])[1] == []
    _, told = parse_command_line(COMMON + BONE)
    assert "--compat rwkv-peft" in told[0]
    assert [line.split(",")[0].split()[0] for line in told[1:]] == [
        *("--train_parts", "--layerwise_lr", "--l2wrap", "--loss_mean")
    ]
    _, told = parse_command_line([*COMMON, *BONE, "--devices", "4", "--lr_schedule", "wsd"])
    assert "  --epoch_steps 200, there 50 (" in "\n".join(told)
    assert "  --lr_schedule wsd, there cos (" in "\n".join(told)


def test_compat_takes_their_meanings_and_defaults_at_once():
    config, told = parse_command_line(
        [*COMMON, *BONE, *SFT, *"--compat rwkv-peft --devices 4".split()]
    )
    assert "meanings and defaults" in told[0]
    assert config.epoch_steps == 50
    assert config.train_parts == ["time", "ln"]
    assert (config.layerwise_lr, config.l2wrap, config.loss_mean) == (True, 1e-4, "micro_batches")
    assert (config.template, config.loss_mask) == ("rwkv-peft", "qa")
    assert config.bone_r == 16
    bare = parse_train_flags("--load_model m --data_file d --compat rwkv-peft --peft lora".split())
    assert (bare.ctx_len, bare.lr_init, bare.lr_final) == (1024, 6e-4, 1e-5)
    assert (bare.lora_r, bare.lora_alpha, bare.lora_dropout) == (8, 32.0, 0.01)
    with pytest.raises(ConfigurationError, match="--compat peft: choose one of rwkv-peft"):
        parse_train_flags([*COMMON, "--compat", "peft"])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"lr_init": 1e-3, "lr_final": 1e-3, "warmup_steps": 9}, ("cos", 1e-3, 0)),
        ({"lr_init": 1e-3, "warmup_steps": 9}, ("cos", 1e-5, 0)),
        ({"lr_init": 1e-3, "lr_schedule": "wsd"}, ("cos", 0.0, 100)),
        ({"lr_init": 1e-3, "lr_schedule": "wsd", "warmup_steps": 9}, ("cos", 0.0, 9)),
    ],
)
def test_their_learning_rates(given, expected):
    values = as_rwkv_peft(given)
    found = values.get("lr_schedule", "cos"), values["lr_final"], values["warmup_steps"]
    assert found == expected


def test_their_epochs_count_micro_batches_of_all_devices():
    assert optimizer_steps({"epoch_steps": 1000}) == 1000
    assert optimizer_steps({"epoch_steps": 1000, "devices": 8, "num_nodes": 2}) == 62
    assert optimizer_steps({"epoch_steps": 9, "accumulate_grad_batches": 4}) == 3
    with pytest.raises(ConfigurationError, match="fewer micro batches than the 16 devices"):
        parse_train_flags(
            "--load_model m --data_file d --compat rwkv-peft --epoch_steps 4 --devices 16".split()
        )


def test_the_meanings_survive_the_yaml_file_of_a_run(tmp_path):
    from finchtune.config import config_yaml

    config = parse_train_flags([*COMMON, *BONE, "--compat", "rwkv-peft", "--devices", "4"])
    (tmp_path / "run.yaml").write_text(config_yaml(config))
    assert parse_train_flags(["--config", str(tmp_path / "run.yaml")]) == config
    assert "compat" not in {field.name for field in dataclasses.fields(config)}


def test_their_flags_are_not_ours():
    assert set(FLAGS) - set(FIELDS) >= {"lora", "PISSA", "fla", "merge", "sft_split"}
