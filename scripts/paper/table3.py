"""Table 3: ranks of Bone. The paper's figures are those of LLaMA2-7B."""

from command import Declaration, main
from tables import Line

from finchtune.errors import run_cli

LINES = (
    Line("Bone, r / 4", "bone", 16, {"gsm8k": 45.90, "math": 3.77}),
    Line("Bone, r / 2", "bone", 32, {"gsm8k": 46.18, "math": 7.43}),
    Line("Bone", "bone", 64, {"gsm8k": 48.16, "math": 8.58}),
    Line("Bone, 2 r", "bone", 128, {"gsm8k": 53.49, "math": 10.08}),
)
TABLE = Declaration("table3", "Table 3, ranks of Bone (the paper's: LLaMA2-7B)", LINES)

if __name__ == "__main__":
    run_cli(lambda: main(TABLE))
