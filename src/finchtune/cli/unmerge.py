"""Take an adapter off merged weights again: the base comes back, up to rounding."""

from finchtune.cli.options import Parser, check_output
from finchtune.cli.stated import add_stated_flags, stated_of
from finchtune.errors import printable
from finchtune.weights.unmerging import unmerge_files


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--merged_model", required=True, help="the merged .pth")
    parser.add_argument("--peft_checkpoint", required=True, help="the adapter's .pth")
    parser.add_argument("--output", required=True, help="the base .pth to write")
    parser.add_argument("--base_model", help="also compare with this file")
    add_stated_flags(parser)
    given = parser.parse_args(arguments)
    inputs = (given.merged_model, given.peft_checkpoint, given.base_model)
    check_output(given.output, *inputs, suffixes=(".pth", ".safetensors"))
    found = unmerge_files(
        *(given.merged_model, given.peft_checkpoint, given.output, given.base_model),
        stated_of(given),
    )
    hashes = {
        True: "it is the base, bit for bit",
        False: "it is the base up to rounding, not bit for bit",
        None: "no hash of the base is known to compare with",
    }
    print(f"{printable(given.output)}: {hashes[found['exact']]}")
    if found["largest_difference"] is not None:
        print(
            f"largest difference from {printable(given.base_model)}: "
            f"{found['largest_difference']:.3g}"
        )
