"""Table 4: Bone and Bat. The paper's figures are those of RWKV6-7B."""

from command import Declaration, main
from tables import Line

from finchtune.errors import run_cli

LINES = (
    Line("Bone", "bone", 64, {"gsm8k": 41.73, "math": 6.52}),
    Line("Bat", "bat", 64, {"gsm8k": 42.76, "math": 6.60}, {"bat_mode": "row"}),
)
TABLE = Declaration(
    "table4", "Table 4, Bone and Bat", LINES, smoke_lrs=(1e-3, 3e-3), smoke_seeds=(0, 1)
)

if __name__ == "__main__":
    run_cli(lambda: main(TABLE))
