"""What training in bf16 costs each method: the loss after a few steps in fp32 and in bf16.

    python scripts/bench/precision.py --model tiny6.pth --data gsm8k_train.jsonl
    python scripts/bench/precision.py --model tiny6.pth --data gsm8k_train.jsonl --methods dora time

Prints a table: the mean loss of the last three steps in fp32, in bf16, and the difference. `time`,
`ln` and the like are --train_parts beside a Bone of rank 1, whose own part is small. Text
that the model's own tokenizer did not make begins at a high loss, of which much is to be learnt.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

METHODS = {
    "lora": "--peft lora --lora_r 8",
    "dora": "--peft dora --lora_r 8",
    "bone": "--peft bone --bone_r 8",
    "bat": "--peft bat --bat_r 8",
    "disha": "--peft disha --disha_r1 8 --disha_r2 8",
    "pissa": "--peft pissa --pissa_r 8",
    "olora": "--peft olora --lora_r 8",
    "lora_ga": "--peft lora_ga --lora_r 8 --lora_ga_batches 1",
    "time": "--peft bone --bone_r 1 --train_parts time",
    "time_decay": "--peft bone --bone_r 1 --train_parts time_decay",
    "time_maa": "--peft bone --bone_r 1 --train_parts time_maa",
    "ln": "--peft bone --bone_r 1 --train_parts ln",
}
LAST = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="a .jsonl of questions and answers")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--tokenizer", default="world")
    parser.add_argument("--rows", type=int, default=8, help="in a step")
    parser.add_argument("--ctx_len", type=int, default=128)
    given = parser.parse_args()
    print("| method | fp32 | bf16 | bf16 - fp32 |\n|---|---|---|---|", flush=True)
    for method in given.methods:
        fp32, bf16 = (loss(given, method, precision) for precision in ("fp32", "bf16"))
        print(f"| {method} | {fp32:.4f} | {bf16:.4f} | {bf16 - fp32:+.4f} |", flush=True)


def loss(given: argparse.Namespace, method: str, precision: str) -> float:
    """The mean loss of the last steps of a run."""
    with tempfile.TemporaryDirectory() as folder:
        words = f"""--load_model {given.model} --data_file {given.data} --data_type sft --sft_field
            question answer --ctx_len {given.ctx_len} --micro_bsz {given.rows} --epoch_steps
            {given.steps} --lr_init {given.lr} --lr_schedule constant --precision {precision}
            --tokenizer {given.tokenizer} --accelerator cpu --proj_dir {folder}/run
            {METHODS[method]}""".split()
        command = [sys.executable, "-m", "finchtune", "train", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        rows = Path(folder, "run/metrics.jsonl").read_text().splitlines()
        losses = [json.loads(row)["loss"] for row in rows[-LAST:]]
        return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
