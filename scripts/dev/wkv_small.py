"""Small calls of every GPU kernel, for compute-sanitizer, which slows them a hundredfold.

compute-sanitizer --tool racecheck --error-exitcode 9 python scripts/dev/wkv_small.py
"""

import torch

from finchtune.adapters import QuantisedWeight, attach
from finchtune.adapters.fp8 import rounded_rows, turned
from finchtune.adapters.frozen import coded_product
from finchtune.adapters.quantise import LARGEST
from finchtune.errors import UserError, run_cli
from finchtune.models import Generation, generations
from finchtune.ops.wkv6 import wkv6
from finchtune.ops.wkv7 import wkv7

# B, T, H, N, dtype, boundaries of packed sequences
CALLS = [
    (1, 203, 2, 64, torch.bfloat16, None),
    (1, 600, 1, 64, torch.bfloat16, None),  # cut into segments
    (1, 700, 1, 64, torch.bfloat16, [0, 1, 16, 16, 33, 150, 700]),  # one of them empty
    (5, 70, 60, 64, torch.bfloat16, None),  # more heads than a GPU has places
    (1, 20, 1, 24, torch.float32, None),  # the scan
    (2, 1, 2, 64, torch.bfloat16, None),
]


def call(
    operator: str, B: int, T: int, H: int, N: int, dtype: torch.dtype, bounds: list[int] | None
) -> None:
    """Forward and backward on random inputs; what comes out must be finite."""
    n = B if bounds is None else len(bounds) - 1
    count = 4 if operator == "wkv6" else 6
    rows = torch.randn(count, B, T, H, N, device="cuda").to(dtype).unbind()
    if operator == "wkv7":  # its decays and what it removes are small in a model too
        *others, w, a, b = rows
        a = torch.nn.functional.normalize(a, dim=-1)
        rows = (*others, -w.abs() - 0.5, -a, a * b.sigmoid())
    leaves = [x.detach().requires_grad_() for x in rows]
    if operator == "wkv6":
        leaves += [torch.randn(H, N, device="cuda", requires_grad=True)]
    leaves += [torch.randn(n, H, N, N, device="cuda", requires_grad=True)]
    cu_seqlens = None if bounds is None else torch.tensor(bounds, device="cuda")
    y, state = (wkv6 if operator == "wkv6" else wkv7)(*leaves, cu_seqlens)
    gradients = torch.autograd.grad(y.float().square().sum() + state.sum(), leaves)
    torch.cuda.synchronize()
    assert all(x.isfinite().all() for x in (y, state, *gradients)), (operator, B, T, H, N, dtype)


def train(generation: Generation, method: str | None, quant: str | None = None) -> None:
    """A step of a small model: the element-wise parts, an adapter's linears, the loss. Without a
    method all of it is trained; the second layer of an RWKV-7 mixes values.
    """
    model = generation.model(generation.sizes(n_layer=2, n_embd=128, vocab_size=300), 1)
    generation.init_weights(model, 0).bfloat16()
    if method:
        attach(model, method, r=16, quant=quant)
    model.cuda()
    tokens = torch.randint(300, (2, 70), device="cuda")
    loss, _ = model.loss(tokens, tokens)
    loss.backward()
    torch.cuda.synchronize()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(x.isfinite().all() for x in gradients), (generation.name, method)


def quantised() -> None:
    """Products with codes of each kind, and what products in fp8 are made of."""
    for kind in LARGEST:
        W = QuantisedWeight(torch.randn(112, 192), kind).to(torch.device("cuda"))
        for rows in (1, 3, 8):
            x = torch.randn(rows, 192, device="cuda", dtype=torch.bfloat16)
            assert coded_product(x, W.codes, W.scales, W.form).isfinite().all(), (kind, rows)
    x, factors = torch.randn(70, 192, device="cuda"), torch.rand(192, device="cuda")
    for given in (None, factors):
        codes, scales = rounded_rows(x, given)
        assert codes.float().isfinite().all()
        assert scales.isfinite().all()
    codes = torch.randint(256, (112, 192), device="cuda").to(torch.uint8)
    assert torch.equal(turned(codes), codes.T)


def main() -> None:
    if not torch.cuda.is_available():
        raise UserError("this needs a CUDA device")
    for operator in ("wkv6", "wkv7"):
        for arguments in CALLS:
            call(operator, *arguments)
    quantised()
    for generation in generations().values():
        train(generation, None)
    for method, quant in (("bone", "nf4"), ("bat", None)):
        train(generations()["x060"], method, quant)
    print(f"{2 * len(CALLS)} calls, all finite")


if __name__ == "__main__":
    run_cli(main)
