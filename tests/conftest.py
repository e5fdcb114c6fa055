"""Fixtures shared by all tests."""

from pathlib import Path

import pytest
import torch

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
