"""GGUF in llama.cpp itself: the same tokens, probabilities and token ids as here."""

import random

import gguf
import pytest
import torch
from helpers.adapted import make_adapter
from helpers.llama_cpp import LlamaCpp
from helpers.support import save_model, small_model

from finchtune.data import templates
from finchtune.models import generation_of
from finchtune.tokenizer import load_tokenizer
from finchtune.weights.base import load_model, read_base
from finchtune.weights.exporting import export_adapter, export_model
from finchtune.weights.forms import FORMS, Settings
from finchtune.weights.forms.base import from_form
from finchtune.weights.merging import merge_files

GGUF = FORMS["gguf"]
PROMPT = [40, 1000, 65000, 12, 300]
RANKS = {"dim_decay_lora": 32, "dim_rate_lora": 64, "dim_value_lora": 96, "dim_gate_lora": 128}
SHALLOW = {"n_layer": 2, "n_embd": 64}
SIZES = [
    pytest.param(SHALLOW, marks=pytest.mark.slow),
    {"n_layer": 8, "n_embd": 128},  # deep enough for halved hidden states
    {"n_layer": 3, "n_embd": 128, "generation": 7, **RANKS},
]
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-3, "q8_0": 0.15}
"""Of log-probabilities, whose deviation is 1. llama.cpp rounds activations to fp16 and q8_0 too."""
DIFFERING = {"fp32": 0, "fp16": 2, "q8_0": 20}
"""Of STEPS greedy tokens, those that may be others: activations are rounded there, and not here."""
STEPS = 100


def settings(dtype: str) -> Settings:
    return Settings(dtype, "small", load_tokenizer("world"), templates.get("chat"))


@torch.no_grad()
def next_log_probabilities(model, tokens: list[int]) -> torch.Tensor:
    return model(torch.tensor([tokens]))[0][0, -1].log_softmax(-1)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_llama_cpp_computes_the_same(sizes, dtype, tmp_path):
    model = small_model(vocab_size=65536, head_size=64, **sizes)
    base, path = save_model(model, tmp_path / "base.pth"), tmp_path / "model.gguf"
    export_model(base, path, GGUF, settings(dtype))
    if dtype != "fp32":
        model.load_state_dict(dequantised(path, model))  # our own logits from the same weights
    runtime = LlamaCpp(path)
    found = runtime.log_probabilities(PROMPT, 50)
    expected = next_log_probabilities(model, PROMPT)
    assert len(found) == 50
    for token, probability in found.items():
        assert probability == pytest.approx(float(expected[token]), abs=TOLERANCE[dtype])
    check_greedy(model, runtime.greedy(PROMPT, STEPS), TOLERANCE[dtype], DIFFERING[dtype])


def dequantised(path, model) -> dict[str, torch.Tensor]:
    """The numbers that a rounded or quantised file holds."""
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        shape = [int(size) for size in reversed(tensor.shape)]
        tensors[tensor.name] = torch.tensor(numbers).view(shape)
    generation = generation_of(model.state_dict())
    sizes = model.config
    told = {"head_size": sizes.head_size}
    return dict(from_form(tensors, "gguf", generation, sizes.n_layer, path, **told))


def check_greedy(model, tokens: list[int], tolerance: float, differing: int) -> None:
    """Every token is the likeliest here too, but for a few that are so up to the tolerance."""
    assert len(tokens) == STEPS
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + tokens]))[0][0, len(PROMPT) - 1 : -1]
    probabilities = logits.log_softmax(-1)
    best, likeliest = probabilities.max(-1)
    chosen = torch.tensor(tokens)
    gaps = best - probabilities.gather(1, chosen[:, None])[:, 0]
    assert gaps.max() <= tolerance
    assert int((chosen != likeliest).sum()) <= differing


def test_the_vocabulary_gives_our_ids(tmp_path):
    model = small_model(n_layer=1, n_embd=64, vocab_size=65536, head_size=64)
    path = tmp_path / "model.gguf"
    export_model(save_model(model, tmp_path / "base.pth"), path, GGUF, settings("fp16"))
    runtime, tokenizer = LlamaCpp(path), load_tokenizer("world")
    generator = random.Random(0)
    for number in range(1000):
        text = random_text(generator, number)
        assert runtime.tokenize(text) == tokenizer.encode(text), repr(text)


def random_text(generator: random.Random, number: int) -> str:
    """Tokens of the vocabulary joined, or characters of many scripts."""
    if number % 2:
        ids = [generator.randrange(1, 65530) for _ in range(20)]
        return load_tokenizer("world").decode(ids).replace("\ufffd", "").replace("\0", "")
    ranges = [(32, 127), (161, 1500), (0x3041, 0x9FFF), (0x1F300, 0x1F6FF), (9, 14)]
    return "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(60))


@pytest.mark.parametrize(
    ("generation", "method", "hyperparameters"),
    [
        (6, "bone", {"r": 24}),
        (6, "disha", {"r1": 24, "r2": 12}),
        (6, "lora", {"r": 4, "alpha": 16}),
        (6, "lora", {"r": 4, "alpha": 16, "rslora": True}),
        (6, "pissa", {"r": 4}),
        (6, "olora", {"r": 4, "alpha": 8}),
        (7, "bone", {"r": 24}),
    ],
    ids=str,
)
def test_an_adapter_alone_does_what_merging_does(generation, method, hyperparameters, tmp_path):
    torch.manual_seed(0)
    sizes = {"n_layer": 7, "n_embd": 64, "vocab_size": 4096, "head_size": 64}
    sizes["generation"] = generation
    base, _, adapter = make_adapter(tmp_path, method, hyperparameters, sizes=sizes)
    export_model(base, tmp_path / "base.gguf", GGUF, settings("fp32"))
    export_adapter(base, adapter, tmp_path / "adapter.gguf", GGUF, settings("fp32"))
    merge_files(base, adapter, tmp_path / "merged.pth")
    export_model(tmp_path / "merged.pth", tmp_path / "merged.gguf", GGUF, settings("fp32"))
    found = [
        LlamaCpp(tmp_path / f"{name}.gguf", adapter and tmp_path / adapter)
        for name, adapter in (("base", None), ("merged", None), ("base", "adapter.gguf"))
    ]
    compared = 0
    for prompt in ([40, 1000, 4000, 12, 300], [7, 700, 1234], [3999, 2000, 500]):
        plain, merged, alone = (runtime.log_probabilities(prompt, 50) for runtime in found)
        if plain and merged and alone:
            assert alone == pytest.approx(merged, abs=1e-5)
            assert alone != pytest.approx(plain, abs=1e-2)
            compared += 1
    assert compared


@pytest.mark.parametrize(("generation", "name"), [(6, "chat"), (7, "think")])
def test_chat_templates_are_used(tmp_path, generation, name):
    sizes = {"n_layer": 2, "n_embd": 64, "vocab_size": 65536, "head_size": 64}
    model = small_model(**sizes, generation=generation)
    path = tmp_path / "model.gguf"
    told = settings("fp32")._replace(template=templates.get(name))
    export_model(save_model(model, tmp_path / "base.pth"), path, GGUF, told)
    messages = [{"role": "user", "content": "hi\n\nyou"}]
    answer = LlamaCpp(path).server.handle_chat_completions({"messages": messages, "max_tokens": 1})
    expected = templates.get(name).prompt("hi\n\nyou")
    assert answer["usage"]["prompt_tokens"] == len(load_tokenizer("world").encode(expected))


def test_a_gguf_is_a_base_bit_for_bit(tmp_path):
    base = save_model(small_model(n_layer=7), tmp_path / "base.pth")
    export_model(base, tmp_path / "base.gguf", GGUF, settings("fp32"))
    tokens = torch.tensor([[1, 2, 3]])
    expected = load_model(base)(tokens)[0]
    assert torch.equal(load_model(tmp_path / "base.gguf")(tokens)[0], expected)
    assert list(read_base(tmp_path / "base.gguf")) == list(read_base(base))
