"""Folders for Hugging Face have the names and shapes that the models of the code there have.

tests/golden has them, taken from fla 0.6's RWKV6ForCausalLM and RWKV7ForCausalLM and from the
Rwkv6ForCausalLM of BBuf/RWKV-World-HF-Tokenizer, all on the meta device.
"""

import json

import pytest
import torch
from helpers.exported import write
from helpers.support import REPOSITORY, save_model, small_model
from safetensors import safe_open

from finchtune.errors import UserError
from finchtune.tokenizer import load_tokenizer
from finchtune.weights.base import load_model, read_base
from finchtune.weights.forms import FORMS, Settings

SIZES = {"n_layer": 2, "n_embd": 128, "head_size": 64}


@pytest.mark.parametrize(("name", "generation"), [("hf", 6), ("fla", 6), ("fla", 7)])
def test_names_and_shapes_are_those_of_their_own_code(name, generation, tmp_path):
    model = small_model(**SIZES, generation=generation)
    base = save_model(model, tmp_path / "base.pth")
    write(FORMS[name], read_base(base), tmp_path / "out", Settings("fp32", "small"))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        found = {key: list(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    golden = REPOSITORY / "tests" / "golden" / f"{name}_rwkv{generation}_shapes.json"
    assert found == json.loads(golden.read_text())


def test_sizes_that_the_remote_code_cannot_have_are_refused(tmp_path):
    base = save_model(small_model(**SIZES, dim_ffn=512), tmp_path / "base.pth")
    with pytest.raises(UserError, match="takes dim_ffn 448 for n_embd 128, and the model has 512"):
        write(FORMS["hf"], read_base(base), tmp_path / "out", Settings("fp32", "small"))
    write(FORMS["fla"], read_base(base), tmp_path / "fla", Settings("fp32", "small"))
    assert json.loads((tmp_path / "fla" / "config.json").read_text())["intermediate_size"] == 512


def test_the_vocabulary_lies_beside(tmp_path):
    base = save_model(small_model(**SIZES), tmp_path / "base.pth")
    settings = Settings("fp32", "small", load_tokenizer("world"))
    write(FORMS["hf"], read_base(base), tmp_path / "out", settings)
    vocabulary = tmp_path / "out" / "rwkv_vocab_v20230424.txt"
    text = "Hello, world"
    tokenizer = load_tokenizer(str(vocabulary))
    assert tokenizer.encode(text) == load_tokenizer("world").encode(text)


@torch.no_grad()
def fla_logits(weights: dict, config: dict, tokens: list[int]) -> torch.Tensor:
    """What fla's layers compute, token by token, written from their definitions. Logits (T, V)."""
    norm = torch.nn.functional.layer_norm
    C, H, eps = config["hidden_size"], config["num_heads"], config["norm_eps"]

    def get(name):
        return weights[f"model.{name}"]

    x = get("embeddings.weight")[tokens]
    x = norm(x, (C,), get("layers.0.pre_norm.weight"), get("layers.0.pre_norm.bias"), eps)
    for layer in range(config["num_hidden_layers"]):
        parts = {k.split(".", 3)[3]: v for k, v in weights.items()
                 if k.startswith(f"model.layers.{layer}.")}  # fmt: skip
        h = norm(x, (C,), parts["attn_norm.weight"], parts["attn_norm.bias"], eps)
        x = x + fla_attention(h, {k.removeprefix("attn."): v for k, v in parts.items()}, H, eps)
        h = norm(x, (C,), parts["ffn_norm.weight"], parts["ffn_norm.bias"], eps)
        delta = shifted(h) - h
        key = (h + delta * parts["ffn.key.mu"]) @ parts["ffn.key.linear.weight"].T
        gate = (h + delta * parts["ffn.receptance.mu"]) @ parts["ffn.receptance.linear.weight"].T
        x = x + gate.sigmoid() * (key.relu().square() @ parts["ffn.value.weight"].T)
    x = norm(x, (C,), get("norm.weight"), get("norm.bias"), eps)
    return x @ weights["lm_head.weight"].T


def shifted(h: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(h[:1]), h[:-1]])


def fla_attention(h: torch.Tensor, p: dict, H: int, eps: float) -> torch.Tensor:
    T, C = h.shape
    delta = shifted(h) - h
    low = torch.tanh((h + delta * p["x_proj.0.mu"]) @ p["x_proj.0.linear.weight"].T)
    second = p["x_proj.2.weight"].view(C, 5, -1)
    mu = torch.einsum("tnr,hnr->tnh", low.view(T, 5, -1), second) + p["x_bias"]
    r, w, k, v, g = (h + delta * mu[:, i] for i in range(5))
    r, k, v, g = (
        z @ p[f"{n}_proj.linear.weight"].T for z, n in ((r, "r"), (k, "k"), (v, "v"), (g, "g"))
    )
    w = torch.tanh(w @ p["w_proj.linear.lora.0.weight"].T) @ p["w_proj.linear.lora.2.weight"].T
    w = torch.exp(-torch.exp(w + p["w_proj.linear.lora.2.bias"]))
    r, k, v, w = (z.view(T, H, -1) for z in (r, k, v, w))
    state, outputs = torch.zeros(H, C // H, C // H), []
    for t in range(T):
        kv = k[t, :, :, None] * v[t, :, None]
        outputs.append(torch.einsum("hn,hnm->hm", r[t], state + p["bonus"][:, :, None] * kv))
        state = w[t, :, :, None] * state + kv
    o = torch.stack(outputs).view(T, C)
    o = torch.nn.functional.group_norm(o, H, p["g_norm.weight"], p["g_norm.bias"], eps)
    return (o * torch.nn.functional.silu(g)) @ p["o_proj.weight"].T


def test_fla_computes_the_same(tmp_path):
    from safetensors.torch import load_file

    base = save_model(small_model(**SIZES), tmp_path / "base.pth")
    write(FORMS["fla"], read_base(base), tmp_path / "out", Settings("fp32", "small"))
    tokens = [3, 77, 200, 5, 5, 91]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = fla_logits(load_file(tmp_path / "out" / "model.safetensors"), config, tokens)
    expected = load_model(base)(torch.tensor([tokens]))[0][0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
