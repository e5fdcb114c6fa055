"""Whole training steps with each method: the paper's table 6 on a small model, and in bytes on any.

Time: forward, backward and AdamW on random tokens, the methods alternating, median of the steps.
Memory: all tensors alive at the highest moment of such a step (weights, gradients, Adam's
moments, activations), counted storage by storage as torch makes them, so that two runs agree to
the byte; only what an operation holds inside itself is out of sight. Activations alone are counted
the same way on tensors without content, which takes no memory and so any size of model.
"""

import argparse
import itertools
import statistics
import time

import torch
from random_models import add_generation, initialised, sizes_of

from finchtune.adapters import attach
from finchtune.config import TrainConfig
from finchtune.errors import run_cli
from finchtune.memory.estimate import StorageCount, estimate
from finchtune.models.config import ModelSizes
from finchtune.training.optim import adamw, parameter_groups
from finchtune.training.setup import model_plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
METHODS = {
    "lora": {"peft": "lora", "lora_r": 32},
    "bone": {"peft": "bone", "bone_r": 64},
    "bat_row": {"peft": "bat", "bat_r": 64, "bat_mode": "row"},
    "bat_col": {"peft": "bat", "bat_r": 64, "bat_mode": "col"},
}
PAPER = {
    "lora": "12,074 MB 3.62 kt/s",
    "bone": "11,052 MB 3.99 kt/s",
    "bat_row": "22,978 MB 2.16 kt/s",
}
"""Table 6 of arXiv 2409.15371; its Bat builds the changed weight."""


class Steps:
    """A small model with one method, and what its steps take."""

    def __init__(self, config: TrainConfig, sizes: ModelSizes, dtype: torch.dtype, device: str):
        torch.manual_seed(0)
        model = initialised(sizes, int(config.grad_cp)).to(device, dtype)
        self.model = attach(model, config.peft, **config.adapter_hyperparameters)
        groups = parameter_groups(self.model.named_parameters())
        self.optimizer = adamw(groups, 1e-4, (0.9, 0.99), 1e-8)
        self.tokens = torch.randint(sizes.vocab_size, (config.micro_bsz, config.ctx_len + 1))
        self.tokens = self.tokens.to(device)

    def step(self) -> float:
        """Seconds of one step."""
        start = self.clock()
        self.model.loss(self.tokens[:, :-1], self.tokens[:, 1:])[0].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.clock() - start

    def clock(self) -> float:
        if self.tokens.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self) -> int:
        """Bytes of all tensors at the highest moment of a step, after a first one."""
        state = [t for s in self.optimizer.state.values() for t in s.values()]
        with StorageCount() as count:
            for tensor in [*self.model.parameters(), *self.model.buffers(), self.tokens, *state]:
                count.add(tensor)
            self.step()
        return count.peak


def main() -> None:
    given = parse()
    if given.threads:
        torch.set_num_threads(given.threads)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    number = given.generation
    small = sizes_of(number, given.n_layer, given.n_embd, given.vocab_size)
    large = sizes_of(number, 32, 2560, 65536)
    for grad_cp, dtype in itertools.product(given.grad_cp, given.dtypes):
        shared = {"ctx_len": given.ctx_len, "micro_bsz": given.micro_bsz, "grad_cp": grad_cp}
        configs = {name: TrainConfig(**shared, **flags) for name, flags in METHODS.items()}
        print(
            f"\n{dtype}, --grad_cp {grad_cp}, {given.micro_bsz} x {given.ctx_len} tokens, {device}"
        )
        print(f"L{small.n_layer} C{small.n_embd}, run; 3B: RWKV-{number}'s, counted but not run")
        print("method    tokens/s  step MB  to LoRA  to Bone |  3B MB  to LoRA  to Bone | paper")
        runs = {name: Steps(c, small, DTYPES[dtype], device) for name, c in configs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(given.repeats + 1):
            for name, run in runs.items():
                times[name].append(run.step())
        step = {name: run.peak() for name, run in runs.items()}
        whole = {
            n: estimate(c, model_plan(c, large, DTYPES[dtype])).total for n, c in configs.items()
        }
        for name in METHODS:
            speed = given.micro_bsz * given.ctx_len / statistics.median(times[name][1:])
            paper = PAPER.get(name, "")
            row = f"{name:9}{speed:9,.0f} {columns(step, name)} |{columns(whole, name)} | {paper}"
            print(row, flush=True)


def columns(peaks: dict[str, int], name: str) -> str:
    """A peak in MB, and its ratios to LoRA's and Bone's."""
    ratios = (peaks[name] / peaks[other] for other in ("lora", "bone"))
    return f"{peaks[name] / 2**20:8,.0f}" + "".join(f"{ratio:9.3f}" for ratio in ratios)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_generation(parser)
    parser.add_argument("--n_layer", type=int, default=4)
    parser.add_argument("--n_embd", type=int, default=512)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--ctx_len", type=int, default=512)
    parser.add_argument("--micro_bsz", type=int, default=4)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--grad_cp", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--repeats", type=int, default=5, help="steps after a first, uncounted one")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="a GPU where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads")
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
