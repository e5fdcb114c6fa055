"""Table 5: Bat by rows and by columns. The paper's figures are those of RWKV6-3B."""

from command import Declaration, main
from tables import Line

from finchtune.errors import run_cli

LINES = (
    Line("Bat, row", "bat", 64, {"gsm8k": 25.93, "math": 3.12}, {"bat_mode": "row"}),
    Line("Bat, col", "bat", 64, {"gsm8k": 25.25, "math": 3.09}, {"bat_mode": "col"}, "bat_col"),
)
TABLE = Declaration("table5", "Table 5, Bat by rows and by columns", LINES)

if __name__ == "__main__":
    run_cli(lambda: main(TABLE))
