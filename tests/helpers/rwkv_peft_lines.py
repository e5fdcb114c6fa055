"""RWKV-PEFT's published command lines for states and long contexts, and the same lines made small.

Flags and values of github.com/JL-er/RWKV-PEFT, all commits up to 5b8aac9: its README's and its
scripts', each with the commit that it stands in.
"""

import re
from pathlib import Path

COMMON = (
    "--load_model BASE --proj_dir OUT --data_file DATA --data_type binidx --vocab_size 65536 "
    "--epoch_begin 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 --accelerator gpu --devices 1 "
    "--precision bf16 --strategy deepspeed_stage_1"
)
L24, L32 = "--n_layer 24 --n_embd 2048", "--n_layer 32 --n_embd 4096"
L32_SMALL = "--n_layer 32 --n_embd 2560"
X060 = "--pre_ffn 0 --head_qk 0 --my_testing x060"
HOT = "--lr_init 1 --lr_final 1e-1 --warmup_steps 0"
WARM = "--lr_init 1 --lr_final 1e-2 --warmup_steps 10"
README = (
    f"{L24} {X060} {HOT} --ctx_len 2048 --epoch_steps 1000 --epoch_count 100 --epoch_save 1 "
    "--micro_bsz 4 --grad_cp 1"
)
STATE = f"{X060} --train_type state"
ONCE = "--ctx_len 1024 --epoch_steps 1000 --epoch_count 1 --epoch_save 1"
TEN = "--epoch_count 10 --epoch_save 1"
DEMO = f"{L24} {WARM} {STATE} --ctx_len 512 --epoch_steps 800 --epoch_save 1 --micro_bsz 2"
LORA = (
    f"{L24} {X060} --lr_init 1e-4 --lr_final 1e-4 --warmup_steps 0 --grad_cp 1 --lora "
    "--lora_load rwkv-0 --lora_r 64 --lora_alpha 128 --lora_dropout 0.01 "
    "--lora_parts=att,ffn,time,ln --dataload pad --train_type infctx --fla --epoch_count 1"
)
PISSA = f"{LORA} --PISSA --svd_niter 4 --epoch_save 1"

STATES = {
    "README 401724d": f"{README} --train_type state",
    "24c3c68": f"{L32} {WARM} {STATE} {TEN} --ctx_len 1028 --epoch_steps 1000 --micro_bsz 8 "
    "--grad_cp 1 --dataload pad --quant int8 --wandb state",
    "26792b9": f"{L32} {WARM} {STATE} {TEN} --ctx_len 512 --epoch_steps 100 --micro_bsz 8 "
    "--grad_cp 1 --dataload pad --fla",
    "4a6ae20": f"{L32_SMALL} {HOT} {STATE} {ONCE} --micro_bsz 1 --grad_cp 0 --dataload pad "
    "--wandb infctx --fla",
    "6903c3a": f"{L32} {WARM} {STATE} {TEN} --ctx_len 1024 --epoch_steps 800 --micro_bsz 8 "
    "--grad_cp 1 --dataload pad --quant int8 --wandb state --fla --accumulate_grad_batches 8",
    "9bb3bf9": f"{L24} {HOT} {STATE} {TEN} --ctx_len 1024 --epoch_steps 1000 --micro_bsz 8 "
    "--grad_cp 1 --dataload pad --fla",
    "be2aef0": f"{L32_SMALL} {HOT} {STATE} {ONCE} --micro_bsz 1 --grad_cp 0 --dataload pad "
    "--wandb infctx",
    "e07c091": f"{L24} {WARM} {STATE} {TEN} --ctx_len 1024 --epoch_steps 800 --micro_bsz 1 "
    "--grad_cp 1 --dataload pad --quant nf4",
    "e4276b0": f"{L32_SMALL} {HOT} {STATE} {ONCE} --micro_bsz 1 --grad_cp 0 --dataload pad",
    "f4ef3e2": f"{L24} {HOT} {STATE} {ONCE} --micro_bsz 1 --grad_cp 0 --dataload pad --wandb fla "
    "--fla",
    "1836718": f"{L24} --lr_init 1 --lr_final 1e-2 --warmup_steps 0 --my_testing x060 {TEN} "
    "--ctx_len 512 --epoch_steps 800 --micro_bsz 2 --grad_cp 1 --dataload pad --loss_mask pad "
    "--train_type state --dataload pad --fla",
    "3b68e99": f"{DEMO} --epoch_count 1 --grad_cp 1 --dataload pad --fla --wandb peft-test",
    "4a41268": f"{DEMO} --epoch_count 10 --grad_cp 1 --dataload pad --fla",
    "74903e4": f"{DEMO} --epoch_count 1 --grad_cp 1 --dataload pad --fla",
    "5b8aac9": f"{L24} --lr_init 1 --lr_final 1e-2 --warmup_steps 0 --my_testing x070 {TEN} "
    "--ctx_len 512 --epoch_steps 800 --micro_bsz 2 --grad_cp 1 --dataload pad --loss_mask pad "
    "--train_type state --dataload pad --op fla",
}
INFCTX = {
    "26792b9 infctx": f"{PISSA} --ctx_len 4096 --epoch_steps 1000 --micro_bsz 1 --chunk_ctx 512",
    "4a6ae20 infctx": f"{LORA} --ctx_len 1024 --epoch_steps 1000 --epoch_save 5 --micro_bsz 8 "
    "--wandb infctx",
    "94c5ce7": f"{LORA} --ctx_len 16384 --epoch_steps 1000 --epoch_save 5 --micro_bsz 8 "
    "--chunk_ctx 2048 --wandb infctx",
    "9bb3bf9 infctx": f"{PISSA} --ctx_len 4096 --epoch_steps 1000 --micro_bsz 8 --chunk_ctx 2048",
    "be2aef0 infctx": f"{LORA} --ctx_len 1024 --epoch_steps 1000 --epoch_save 5 --micro_bsz 8 "
    "--chunk_ctx 512 --wandb infctx",
    "e07c091 infctx": f"{PISSA} --ctx_len 16384 --epoch_steps 1236 --micro_bsz 8 --chunk_ctx 2048 "
    "--wandb long",
}
DESTRUCTIVE = f"{README} --train_type infctx --chunk_ctx 512 --fla"
"""README 401724d: the rate of its line for states, but every weight is trained."""
OLD_STATES = {
    "README 4a6ae20": f"{L24} {X060} --lr_init 1e-4 --lr_final 1e-4 --warmup_steps 0 "
    "--ctx_len 2048 --epoch_steps 1000 --epoch_count 100 --epoch_save 1 --micro_bsz 4 --grad_cp 1 "
    "--state_tune",
    "36616b4": f"{L32} {X060} {HOT} {TEN} --ctx_len 1024 --epoch_steps 1000 --micro_bsz 1 "
    "--grad_cp 1 --state_tune",
    "396242a": f"{L32_SMALL} {X060} {HOT} {TEN} --ctx_len 1024 --epoch_steps 1000 --micro_bsz 1 "
    "--grad_cp 1 --state_tune",
    "61e4c4c": f"{L24} {X060} {HOT} {TEN} --ctx_len 1024 --epoch_steps 1000 --micro_bsz 8 "
    "--grad_cp 1 --state_tune",
}
"""Before there was --train_type."""

SMALL = {
    **{"n_layer": 2, "n_embd": 64, "vocab_size": 256, "chunk_ctx": 32},
    **{"epoch_steps": 2, "epoch_count": 1, "accelerator": "cpu"},
}
CTX_LEN = {"16384": 256, "4096": 128, "2048": 128}


def whole_line(line: str) -> list[str]:
    """A line with what all have in common, as it was published but for its paths."""
    return f"{COMMON} {line}".split()


def small_line(line: str, base: Path, data: Path, out: Path) -> list[str]:
    """The same with a small model's sizes and few steps, on a CPU; all else as it is."""
    text = f"{COMMON} {line}"
    for name, value in SMALL.items():
        text = re.sub(rf"--{name} \S+", f"--{name} {value}", text)
    text = re.sub(r"--ctx_len (\S+)", lambda m: f"--ctx_len {CTX_LEN.get(m[1], 64)}", text)
    for word, path in (("BASE", base), ("DATA", data), ("OUT", out)):
        text = text.replace(f" {word} ", f" {path} ", 1)
    return text.split()
