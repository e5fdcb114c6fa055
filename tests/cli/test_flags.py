"""The command line: what is understood, what is refused, and with which words."""

import re

import pytest
from helpers.support import run_script

from finchtune.adapters import METHODS, get_method, hyperparameters_of
from finchtune.cli.flags import FIELDS, parse_train_flags
from finchtune.cli.spellings.other_tools import OURS
from finchtune.config import METHODS as CHOICES
from finchtune.config import STATE_LR
from finchtune.errors import ConfigurationError, UserError, with_flags
from finchtune.methods import method_files

BASE = ["--load_model", "m.pth", "--data_file", "d"]


def parse(*words):
    return parse_train_flags([*BASE, *words])


def refusal(words):
    """What a command line with these words prints."""
    with pytest.raises(UserError) as caught:
        parse(*words)
    return with_flags(str(caught.value))


def test_plain_flags_arrive_with_their_types():
    config = parse(
        *"--peft bone --bone_r 8 --lr_init 2e-4 --grad_cp 0 --train_parts time ln".split()
    )
    assert (config.peft, config.bone_r, config.lr_init) == ("bone", 8, 2e-4)
    assert config.grad_cp == 0
    assert config.train_parts == ["time", "ln"]
    assert config.adapter_hyperparameters == {"r": 8}


def test_a_script_of_the_incumbent_runs_unchanged():
    config = parse(
        *"--proj_dir out --vocab_size 65536 --n_layer 32 --n_embd 2560 --data_type binidx".split(),
        *"--dataload pad --loss_mask pad --ctx_len 512 --micro_bsz 4 --epoch_steps 100".split(),
        *"--epoch_count 2 --epoch_save 1 --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0".split(),
        *"--beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --accelerator gpu --devices 4".split(),
        *"--precision bf16 --strategy deepspeed_stage_1 --my_testing x060 --grad_cp 1".split(),
        *"--dim_att 2560 --dim_ffn 8960 --head_size_a 64 --epoch_begin 0".split(),
        *["--train_parts", "[]", "--peft", "bone"],
        *["--bone_config", '{"bone_mode": "bat", "bone_load": "", "bone_r": 64}'],
    )
    assert (config.peft, config.bat_r, config.bat_mode) == ("bat", 64, "row")
    assert config.train_parts == []
    assert config.stage == 1


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--peft", "disha", "--disha_config", '{"mode": "bone", "load": "", "r": 32}'],
         {"peft": "bone", "bone_r": 32}),
        (["--disha_config", '{"mode": "bat", "r": 16}'], {"peft": "bat", "bat_r": 16}),
        (["--peft", "lora", "--lora_config",
          '{"lora_load": "x.pth", "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1}'],
         {"peft": "lora", "lora_r": 8, "lora_alpha": 16.0, "lora_dropout": 0.1,
          "peft_load": "x.pth"}),
        (["--peft", "pissa", "--pissa_config",
          '{"pissa_load": "a.pth", "pissa_init": "i.pth", "pissa_r": 8, "svd_niter": 2}'],
         {"peft": "pissa", "pissa_r": 8, "svd_niter": 2, "pissa_init": "i.pth"}),
        (["--train_parts", '["time", "ln"]', "--peft", "bone"], {"train_parts": ["time", "ln"]}),
    ],
)  # fmt: skip
def test_json_spellings(words, expected):
    config = parse(*words)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pfet", "bone"], "unknown flag --pfet; did you mean --peft?"),
        (["--frobnicate", "1"], "unknown flag --frobnicate"),
        (["--lr_init"], "--lr_init needs a value"),
        (["--peft", "bone", "stray"], "--peft takes one value, not 'bone stray'"),
        (["--peft", "bome"], "--peft bome: choose one of .* did you mean bone?"),
        (["--bone_r", "eight"], "--bone_r takes a whole number, not 'eight'"),
        (["--lr_init", "big"], "--lr_init takes a number"),
        (["--lr_init", "nan"], "--lr_init must be a finite number"),
        (["--lr_init", "-1"], "--lr_init must be zero or more"),
        (["--devices", "5000"], "--devices must be at most 1,024, not 5,000"),
        (["--epoch_steps", str(10**20)], "--epoch_steps must be at most 1,000,000,000, not"),
        (["--random_seed", str(2**64)], "--random_seed must be at most"),
        (["--timeout_minutes", "1e9"], "--timeout_minutes must be at most"),
        (["--lr_init", "10001"], "--lr_init must be at most 10,000"),
        (["--micro_bsz", "0"], "--micro_bsz must be at least 1"),
        (["--beta2", "1"], "--beta2 must be below 1"),
        (["--grad_cp", "yes"], "--grad_cp takes a whole number"),
        (["--grad_cp", "3"], "--grad_cp must be 0, 1 or 2"),
        (["--bone_r", "8"], "--bone_r goes with --peft bone, not --peft none"),
        (["--peft", "bone", "--lora_r", "8"], "--lora_r goes with --peft lora"),
        (["--peft", "bone", "--quant", "4bit"], "choose one of none, nf4, .*fp8_compute; nf4 and"),
        (["--quant", "nf4"], "--quant needs --peft"),
        (["--peft", "bone", "--disha_r1", "8"], "--disha_r1 goes with --peft disha, not"),
        (["--disha_config", '{"r": 8}', "--disha_r2", "8"], "--disha_r2 goes with --peft disha, "),
        (["--peft", "dora", "--rslora", "1"], "--rslora goes with --peft lora, not --peft dora"),
        (["--peft", "bone", "--lora_plus_ratio", "4"], "--lora_plus_ratio goes with --peft lora "),
        (["--peft", "lora", "--lora_ga_batches", "4"], "--lora_ga_batches goes with --peft lora_g"),
        (["--peft", "lora", "--lora_plus_ratio", "0"], "--lora_plus_ratio must be above zero"),
        (["--bone_config", "{"], "--bone_config is not JSON"),
        (["--bone_config", "[1]"], "--bone_config takes an object"),
        (["--bone_config", '{"bone_rank": 8}'], "unknown key 'bone_rank'; did you mean 'bone_r'"),
        (["--bone_config", '{"bone_mode": "bet"}'], "mode is bone or bat, not 'bet'"),
        (["--peft", "lora", "--bone_config", "{}"], "--bone_config goes with --peft bone"),
        (["--peft", "bone", "--bone_r", "8", "--bone_config", '{"bone_r": 8}'], "given twice"),
        (["--my_testing", "x050"], "--my_testing x050: choose one of x060, x070"),
        (["--strategy", "deepspeed_stage_4"], "did you mean deepspeed_stage"),
        (["--sft_field", "a", "b"], "--sft_field goes with --data_type jsonl"),
        (["--peft", "bone", "--weight_decay", "0.1"], "--weight_decay 0.1 would act on nothing"),
        (["--train_parts", "ln"], "--train_parts and --peft_load need --peft"),
        (["--lr_schedule", "exp", "--lr_final", "0"], "exp cannot reach --lr_final 0"),
        (["--lr_schedule", "constant", "--lr_final", "0"], "constant has no use for --lr_final"),
    ],
)
def test_mistakes_are_named(words, message):
    assert re.search(message, refusal(words))


def test_every_method_and_hyperparameter_has_a_flag():
    assert set(CHOICES) == {"none", "state", *METHODS}
    for name in METHODS:
        config = parse("--peft", name)
        reachable = {own.hyperparameter for own in method_files()[name].flags.values()}
        defaults = hyperparameters_of(get_method(name))
        missing = set(defaults) - reachable
        # Another rank than 1024 is --peft lora.
        assert missing == ({"r", "alpha"} if name == "biglora" else set()), name
        given = config.adapter_hyperparameters
        assert given == {key: defaults[key] for key in given}, "one default, wherever it stands"


def test_hyperparameters_reach_their_method():
    config = parse(*"--peft disha --disha_r1 4 --disha_r2 6".split())
    assert config.adapter_hyperparameters == {"r1": 4, "r2": 6}
    config = parse(*"--peft lora --lora_r 8 --lora_alpha 4 --rslora 1".split())
    assert config.adapter_hyperparameters == {"r": 8, "alpha": 4, "dropout": 0, "rslora": True}
    config = parse(*"--peft lora_ga --lora_r 8 --lora_ga_gamma 4 --svd_niter 0".split())
    assert config.adapter_hyperparameters == {"r": 8, "alpha": 32, "gamma": 4, "svd_niter": 0}


@pytest.mark.parametrize("kind", ["none", "int8", "nf4", "fp4", "fp8", "fp8_compute"])
def test_quantised_bases_are_asked_for_as_in_the_incumbent(kind):
    quant = {} if kind == "none" else {"quant": kind}
    config = parse("--peft", "bone", "--quant", kind)
    assert config.adapter_hyperparameters == {"r": 64} | quant


@pytest.mark.parametrize(
    ("words", "adapter", "state", "everything", "rate"),
    [
        ("", "none", False, True, 2e-5),
        ("--train_type none", "none", False, True, 2e-5),
        ("--train_type state", "none", True, False, STATE_LR),
        ("--peft state", "none", True, False, STATE_LR),
        ("--peft state --train_type infctx --chunk_ctx 512", "none", True, False, STATE_LR),
        ("--peft bone --train_type state", "bone", True, False, 2e-5),
        ("--train_type state --lr_init 3 --lr_final 0.01", "none", True, False, 3.0),
        ("--peft bone --train_type infctx --bptt truncated", "bone", False, False, 2e-5),
        ("--peft bone --train_type infctx state --chunk_ctx 512", "bone", True, False, 2e-5),
        ("--train_type state infctx", "none", True, False, STATE_LR),
        ("--train_type state --quant nf4", "none", True, False, STATE_LR),
    ],
)
def test_what_is_trained(words, adapter, state, everything, rate):
    config = parse(*words.split())
    found = config.adapter, config.trains_state, config.trains_all, config.lr_init
    assert found == (adapter, state, everything, rate)
    assert config.state_lr == (rate if adapter == "none" else STATE_LR)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr_init 1", "would destroy a model .* --train_type state"),
        ("--chunk_ctx 512", "--chunk_ctx goes with --train_type infctx"),
        ("--bptt truncated --train_type state", "--bptt goes with --train_type infctx"),
        ("--train_type stat", "did you mean state"),
        ("--train_type state stat", "--train_type stat: choose .* did you mean state"),
        ("--train_type state,infctx", "several stand with a space between them: state infctx"),
        ("--train_type", "--train_type needs a value"),
        ("--quant nf4", "--quant needs --peft, or --train_type state"),
        ("--train_type state --lr_state 1", "--lr_state goes with --train_type state and an adap"),
        ("--train_type infctx --chunk_ctx 512 --context_parallel 3", "must divide --chunk_ctx 512"),
        ("--train_type infctx --chunk_ctx 0", "--chunk_ctx must be at least 1"),
    ],
)
def test_flags_of_states_and_contexts_that_do_not_go_together(words, message):
    assert re.search(message, refusal(words.split()))


def test_data_flags_of_the_incumbent():
    config = parse(
        *"--data_type sft --sft_field query response --sft_split train --data_shuffle 1".split(),
        *"--dataload pack --loss_mask qa".split(),
    )
    assert (config.data_type, config.dataload, config.loss_mask) == ("sft", "pack", "qa")
    assert config.sft_field == ["query", "response"]
    for value in ("uint16", "numpy", "dummy", "utf-8"):
        with pytest.raises(UserError, match=f"--data_type {value}: choose one of binidx, jsonl, "):
            parse("--data_type", value)
    with pytest.raises(UserError, match="--loss_mask se: choose one of none, pad, qa"):
        parse("--loss_mask", "se")


def test_model_and_data_are_required():
    with pytest.raises(UserError, match="`load_model` is missing"):
        parse_train_flags(["--data_file", "d"])
    with pytest.raises(UserError, match="`data_file` is missing"):
        parse_train_flags(["--load_model", "m"])


def test_all_mistakes_are_told_together():
    with pytest.raises(ConfigurationError) as caught:
        parse("--peft", "bome", "--lr_init", "big", "--batch_size", "4")
    assert caught.value.lines == [
        "unknown flag --batch_size; here it is --micro_bsz",
        "--peft bome: choose one of " + ", ".join(CHOICES) + "; did you mean bone?",
        "--lr_init takes a number, not 'big'",
    ]
    with pytest.raises(ConfigurationError) as caught:
        parse_train_flags(["--load_model", "m", "--beta1", "1", "--early_stop", "2"])
    assert [line.split()[0] for line in caught.value.lines] == [
        *("`data_file`", "`beta1`", "`early_stop`")
    ]


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("batch_size", "micro_bsz"),
        ("epochs", "epoch_count"),
        ("lr", "lr_init"),
        ("learning_rate", "lr_init"),
        ("max_seq_length", "ctx_len"),
        ("output_dir", "proj_dir"),
        ("model", "load_model"),
        ("dataset", "data_file"),
    ],
)
def test_names_of_other_tools_are_hinted(theirs, ours):
    with pytest.raises(UserError, match=f"unknown flag --{theirs}; here it is --{ours}$"):
        parse(f"--{theirs}", "1")


def test_hints_name_flags_that_there_are():
    assert set(OURS.values()) <= set(FIELDS)
    assert not set(OURS) & set(FIELDS)


def test_help_is_fast_and_fits_a_terminal():
    """Without importing torch, which takes a second; 80 columns, no word broken."""
    done = run_script("train.py", "--help", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0
    assert " torch\n" not in done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    for field in FIELDS.values():
        assert f"--{field.name} " in done.stdout
        for word in field.metadata["help"].split():
            assert word in done.stdout, word
