"""Fine-tune an RWKV model: base weights and text in, adapter (or model) weights out.

    python train.py --load_model base.pth --data_file corpus --peft bone --bone_r 64

`--help` lists every flag. Runs on one process, on several with `--devices N`, or under torchrun
or deepspeed. The loop itself is `train` in src/finchtune/training/loop.py.
"""

from finchtune.cli.main import run

if __name__ == "__main__":
    run("train")
