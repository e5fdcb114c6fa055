"""Write a new, untrained weight file."""

import torch

from finchtune.cli.options import Parser, check_output
from finchtune.errors import printable
from finchtune.models.generations import by_number
from finchtune.weights.tensors import write_tensors


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--n_layer", type=int, required=True)
    parser.add_argument("--n_embd", type=int, required=True)
    parser.add_argument("--vocab_size", type=int, required=True)
    parser.add_argument("--head_size_a", type=int, default=64, help="channels in a head")
    parser.add_argument(
        "--dim_ffn", type=int, help="default: what the generation has for this n_embd"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", required=True, help="the .pth to write")
    numbers = by_number()
    parser.add_argument("--generation", type=int, choices=numbers, default=6, help="of RWKV [6]")
    given = parser.parse_args(arguments)
    check_output(given.output)
    generation = numbers[given.generation]
    sizes = generation.sizes(
        n_layer=given.n_layer,
        n_embd=given.n_embd,
        vocab_size=given.vocab_size,
        dim_ffn=given.dim_ffn,
        head_size=given.head_size_a,
    )
    model = generation.init_weights(generation.model(sizes, 0), given.seed)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[given.precision]
    write_tensors({name: t.to(dtype) for name, t in model.state_dict().items()}, given.output)
    n_parameters = sum(p.numel() for p in model.parameters())
    print(f"{printable(given.output)}: {n_parameters / 1e6:.2f} M parameters, {sizes}")
