"""Fixtures shared by all tests."""

from pathlib import Path

import pytest
import torch

from finchtune.kernels import has_kernels

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def reset_torch_state():
    """Every test starts from the same seed and dtype, and leaves no global setting behind."""
    torch.manual_seed(0)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="session")
def tiny6() -> Path:
    """A real trained RWKV-6 (L12 C128 V256), where the folder of shared data lies beside us."""
    path = SHARED_DATA / "tiny6.pth"
    if not path.exists():
        pytest.skip(f"needs the trained model {path.name}, which is not shipped")
    return path


@pytest.fixture(scope="session")
def gsm8k_train() -> Path:
    """GSM8K's training problems (question, answer), where they lie beside us."""
    path = SHARED_DATA / "gsm8k_train.jsonl"
    if not path.exists():
        pytest.skip(f"needs the data set {path.name}, which is not shipped")
    return path


@pytest.fixture(scope="session")
def byte_level_bpe(tmp_path_factory) -> str:
    """A tokenizer.json like the Pile's: byte-level BPE, <|endoftext|> first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["Finch 芬奇 🐦 def f(x): return x ** 2\n" * 5], trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def kernels():
    """Skips where the compiled kernels cannot be had."""
    if not has_kernels("cpu"):
        pytest.skip("needs a C++ compiler")
