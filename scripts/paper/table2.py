"""Table 2: LoRA and its kin, DoRA and Bone on math, code and chat.

The paper's figures are those of RWKV6-7B. DoRA and MBPP are in its later version only (arXiv
2409.15371v11, table 5), for other models than RWKV-6.
"""

from command import Declaration, main
from tables import Line

from finchtune.errors import run_cli

LINES = (
    Line("LoRA", "lora", 32, {"gsm8k": 38.13, "math": 6.06}),
    Line("OLoRA", "olora", 32),
    Line("PiSSA", "pissa", 32, {"gsm8k": 40.48, "math": 6.12}),
    Line("DoRA", "dora", 32),
    Line("Bone", "bone", 64, {"gsm8k": 41.73, "math": 6.52}),
)
TABLE = Declaration(
    "table2", "Table 2, methods on math, code and chat", LINES, ("math", "code", "chat")
)

if __name__ == "__main__":
    run_cli(lambda: main(TABLE))
