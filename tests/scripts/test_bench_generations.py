"""Benchmarks that make models of their own make them of either generation."""

import pytest
from helpers.support import run_script

TINY = "--generation 7 --n_layer 2 --n_embd 64 --vocab_size 256"
CALLS = {
    "adapter_steps": (
        f"{TINY} --ctx_len 16 --micro_bsz 1 --repeats 1 --dtypes fp32 --grad_cp 0",
        "RWKV-7's",
    ),
    "generate": (f"{TINY} --prompt 4 --tokens 4 --batch 1 2 --rounds 1", "the same"),
    "generate_adapters": (f"{TINY} --prompt 4 --tokens 2 --batch 1 --rounds 1", "bone, nf4"),
    "long_context": (
        "speed --generation 7 --layers 2 --channels 64 --lengths 32 --chunk 16 --repeats 1",
        '"chunk": 16',
    ),
    "gpu_steps": ("--dry --sizes 2.9b --methods bone --shapes 1x16 --repeats 1", "2.9b"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_benchmark_runs_on_rwkv7(name):
    flags, expected = CALLS[name]
    done = run_script(f"scripts/bench/{name}.py", *flags.split())
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert "DIFFERS" not in done.stdout
    assert "Error" not in done.stdout
