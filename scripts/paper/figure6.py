"""Figure 6: loss curves of Bone at several ranks. The cells are table 3's."""

from command import Declaration, main
from table3 import LINES

from finchtune.errors import run_cli

FIGURE = Declaration("figure6", "Figure 6, convergence of Bone by rank", LINES)

if __name__ == "__main__":
    run_cli(lambda: main(FIGURE))
