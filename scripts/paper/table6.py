"""Table 6: memory and speed of LoRA, Bone and Bat, without and with recomputation.

A row of 512 tokens a step, as in the paper, whose figures are those of RWKV6-3B: on one RTX 4090,
and with recomputation on four (memory of one of them, tokens of all): give --devices 4 for these.
One cell runs at a time, on a machine that should have nothing else to do.
"""

from collections.abc import Sequence

from command import Declaration, main
from language import Inputs
from tables import Column, Line

from finchtune.errors import run_cli

STEPS = {"epoch_steps": 60, "micro_bsz": 1, "global_bsz": 1, "save_every": 0}


def line(label: str, peft: str, r: int, grad_cp: int, memory: float, speed: float) -> Line:
    """A method without (0) or with (1) recomputation."""
    name = f"{peft}-cp{grad_cp}"
    return Line(
        label,
        peft,
        r,
        {"memory": memory, "speed": speed},
        {"grad_cp": grad_cp},
        f"resources-{name}",
    )


def columns(inputs: Inputs, courses: Sequence[str]) -> list[Column]:
    """The highest memory of a step, and the median speed."""
    return [
        Column("memory", "memory, MB", courses[0], "training", "memory_mb", digits=0),
        Column("speed", "kt/s", courses[0], "training", "tokens_per_s", 1e-3),
    ]


LINES = (
    line("LoRA", "lora", 32, 0, 12074, 3.62),
    line("Bone", "bone", 64, 0, 11052, 3.99),
    line("Bat", "bat", 64, 0, 22978, 2.16),
    line("LoRA, recomputation", "lora", 32, 1, 15328, 15.6),
    line("Bone, recomputation", "bone", 64, 1, 15304, 16.0),
    line("Bat, recomputation", "bat", 64, 1, 15305, 14.2),
)
TABLE = Declaration(
    "table6",
    "Table 6, memory and speed",
    LINES,
    tested=False,
    columns=columns,
    train=STEPS,
    draw=None,
    seeds=(0,),
)

if __name__ == "__main__":
    run_cli(lambda: main(TABLE))
