"""Figure 5: loss curves of Bone, Bat and LoRA's kin at equal trainable parameters.

The cells are table 2's and table 4's: in one --output none is run twice. The held-out loss is taken
where --test gsm8k=FILE is given.
"""

import table2
import table4
from command import Declaration, main

from finchtune.errors import run_cli

SHOWN = ("LoRA", "OLoRA", "PiSSA", "Bone")
FIGURE = Declaration(
    "figure5",
    "Figure 5, convergence",
    (
        *(line for line in table2.LINES if line.label in SHOWN),
        *(line for line in table4.LINES if line.label == "Bat"),
    ),
)

if __name__ == "__main__":
    run_cli(lambda: main(FIGURE))
