"""`wkv6` on a GPU, through the binding and its autograd function, against float64 autograd."""

import pytest
import torch
from torch import Tensor

from finchtune.ops.wkv6 import wkv6
from finchtune.ops.wkv6.reference import wkv6_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NAMES = ("r", "k", "v", "w", "u", "state")
# Root mean square errors. Tensor cores round operands and results, the scan its results only.
TENSOR_CORES, BF16, FP16, FP32 = 4e-3, 2e-3, 3e-4, 3e-6


def raw_decay(regime: str, shape: tuple[int, ...]) -> Tensor:
    if regime == "mixed":
        return torch.where(torch.rand(shape) < 0.5, 3.0, -8.0)
    return torch.linspace(-6, 1, shape[-1]) + 0.5 * torch.randn(shape)


def random_inputs(regime: str, n_seq: int, *shape: int) -> list[Tensor]:
    """r, k, v, w, u, state and the gradients of y and of the final state, on the CPU."""
    _, _, H, N = shape
    r, k, v, dy = (torch.randn(shape) for _ in range(4))
    state, dstate = (torch.randn(n_seq, H, N, N) for _ in range(2))
    return [r, k, v, raw_decay(regime, shape), 0.5 * torch.randn(H, N), state, dy, dstate]


def with_gradients(form, leaves, dy, dstate, cu_seqlens) -> dict[str, Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    y, final = form(*leaves, cu_seqlens)
    gradients = torch.autograd.grad([y, final], leaves, [dy, dstate])
    return {"y": y, "final": final, **dict(zip(NAMES, gradients, strict=True))}


def check_against_reference(inputs, dtype, tolerance, cu_seqlens=None) -> None:
    r, k, v, w, u, state, dy, dstate = (x.cuda() for x in inputs)
    r, k, v, w, u, dy = (x.to(dtype) for x in (r, k, v, w, u, dy))
    leaves = (r, k, v, w, u, state)
    actual = with_gradients(wkv6, leaves, dy, dstate, cu_seqlens)
    wide = [x.double() for x in leaves]
    expected = with_gradients(wkv6_reference, wide, dy.double(), dstate.double(), cu_seqlens)
    errors = {
        name: ((actual[name].double() - x).norm() / x.norm()).item() for name, x in expected.items()
    }
    # The gradient of u comes back in u's dtype, so it is rounded whatever computed it.
    assert all(error <= tolerance for error in errors.values()), errors


@pytest.mark.parametrize("regime", ["typical", "mixed"])
@pytest.mark.parametrize(
    ("T", "H"), [(17, 2), (64, 3), (203, 2), (1000, 1)], ids=lambda value: str(value)
)
def test_tensor_cores(regime, T, H):
    check_against_reference(random_inputs(regime, 2, 2, T, H, 64), torch.bfloat16, TENSOR_CORES)


@pytest.mark.parametrize("regime", ["typical", "mixed"])
def test_many_heads_run_uncut(regime):
    """More thread blocks than twice the multiprocessors of any GPU."""
    check_against_reference(random_inputs(regime, 6, 6, 70, 60, 64), torch.bfloat16, TENSOR_CORES)


@pytest.mark.parametrize("regime", ["typical", "mixed"])
def test_packed_sequences(regime):
    lengths = torch.tensor([1, 15, 16, 0, 17, 300, 64, 65])
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to("cuda", torch.int32)
    inputs = random_inputs(regime, len(lengths), 1, int(lengths.sum()), 2, 64)
    check_against_reference(inputs, torch.bfloat16, TENSOR_CORES, cu_seqlens)


@pytest.mark.parametrize(
    ("N", "dtype", "tolerance"),
    [
        (64, torch.float32, FP32),
        (8, torch.float32, FP32),
        (128, torch.float32, FP32),
        (32, torch.bfloat16, BF16),
        (64, torch.float16, FP16),
    ],
    ids=str,
)
def test_scan(N, dtype, tolerance):
    check_against_reference(random_inputs("mixed", 2, 2, 150, 2, N), dtype, tolerance)


@pytest.mark.parametrize("T", [1, 2, 16])
def test_short_sequences(T):
    check_against_reference(random_inputs("typical", 3, 3, T, 2, 64), torch.bfloat16, BF16)


def test_same_bits_every_time():
    inputs = [x.cuda() for x in random_inputs("typical", 2, 2, 500, 4, 64)]
    *leaves, dy, dstate = inputs
    leaves = [x.bfloat16() for x in leaves[:5]] + [leaves[5]]
    runs = [with_gradients(wkv6, leaves, dy.bfloat16(), dstate, None) for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(run[name], x) for name, x in runs[0].items())


def test_other_streams():
    """The kernels run on torch's current stream: after what that stream still has to do."""
    inputs = [x.cuda() for x in random_inputs("typical", 2, 2, 300, 4, 64)]
    r, k, v, w, u = (x.bfloat16() for x in inputs[:5])
    expected, _ = wkv6(r, k, v, w, u, inputs[5])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late = r.clone()
        y, _ = wkv6(late, k, v, w, u, inputs[5])
    stream.synchronize()
    assert torch.equal(y, expected)


def test_views_are_taken():
    """Slices of other tensors: not dense, or dense and not at a multiple of 16 bytes."""
    r, k, v, w, u, state, *_ = (x.cuda() for x in random_inputs("typical", 2, 2, 70, 3, 64))
    rows = [x.bfloat16() for x in (r, k, v, w)]
    expected = wkv6(*rows, u, state)
    strided = torch.stack(rows, dim=-1).unbind(-1)
    shifted = [torch.empty(x.numel() + 3, dtype=x.dtype, device="cuda")[3:] for x in rows]
    shifted = [y.view_as(x).copy_(x) for x, y in zip(rows, shifted, strict=True)]
    for views in (strided, shifted):
        assert all(map(torch.equal, wkv6(*views, u, state), expected))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_need_not_be_the_current_one():
    inputs = [x.bfloat16() for x in random_inputs("typical", 2, 2, 300, 3, 64)[:5]]
    expected, _ = wkv6(*(x.cuda(0) for x in inputs))
    with torch.cuda.device(0):
        y, _ = wkv6(*(x.cuda(1) for x in inputs))
    assert y.device.index == 1
    torch.testing.assert_close(y.cpu(), expected.cpu())


def test_more_than_two_to_the_31_elements():
    """The end of a tensor that 32-bit offsets cannot reach equals a run on that end alone."""
    B, T, H, N = 1, 140_000, 240, 64
    if torch.cuda.mem_get_info()[0] < 7 * B * T * H * N * 2:
        pytest.skip("needs 30 GB of free GPU memory")
    shape = (B, T, H, N)
    r, k, v, w = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    assert r.numel() > 2**31
    u = torch.randn(H, N, device="cuda")
    part = slice(T - 640, T)
    with torch.no_grad():
        y, final = wkv6(r, k, v, w, u)
        _, state = wkv6(*(x[:, : T - 640] for x in (r, k, v, w)), u)
        expected, expected_final = wkv6(*(x[:, part] for x in (r, k, v, w)), u, state)
    for actual, wanted in ((y[:, part], expected), (final, expected_final)):
        error = (actual.double() - wanted.double()).norm() / wanted.double().norm()
        assert error <= TENSOR_CORES
