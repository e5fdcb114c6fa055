"""RWKV-7 for flash-linear-attention: what fla's layers compute, written from their definitions."""

import json

import torch
import torch.nn.functional as F
from helpers.exported import write
from helpers.support import relative_error, save_model, small_model
from safetensors.torch import load_file

from finchtune.weights.base import load_model, read_base
from finchtune.weights.forms import FORMS, Settings


def low_rank(p: dict, name: str, x: torch.Tensor, activation=lambda low: low) -> torch.Tensor:
    up = activation(x @ p[f"{name}_lora.lora.0.weight"].T) @ p[f"{name}_lora.lora.2.weight"].T
    return up + p.get(f"{name}_lora.lora.2.bias", 0)


def shifted(h: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(h[:1]), h[:-1]])


def attention(h, first, p, config):
    """fla/layers/rwkv7.py, token by token: h (T, C), the first layer's values -> the same two."""
    (T, C), H = h.shape, config["num_heads"]
    delta = shifted(h) - h
    xr, xw, xk, xv, xa, xg = (h + delta * p[f"x_{n}"].view(-1) for n in "rwkvag")
    r, k, v = (x @ p[f"{n}_proj.weight"].T for n, x in (("r", xr), ("k", xk), ("v", xv)))
    decay = torch.exp(-0.6065306597126334 * low_rank(p, "w", xw, torch.tanh).sigmoid())
    a = low_rank(p, "a", xa).sigmoid()
    g = low_rank(p, "g", xg, torch.sigmoid)
    v = v if first is None else torch.lerp(v, first, low_rank(p, "v", xv).sigmoid())
    kk = F.normalize((k * p["k_k"]).view(T, H, -1), dim=-1)
    k2 = (k + k * (a - 1) * p["k_a"]).view(T, H, -1)
    r, decay, a, v2 = (x.view(T, H, -1) for x in (r, decay, a, v))
    state, outputs = torch.zeros(H, C // H, C // H), []  # key by value
    for t in range(T):
        read = torch.einsum("hk,hkv->hv", -kk[t], state)
        state = decay[t, :, :, None] * state + (kk[t] * a[t])[:, :, None] * read[:, None]
        state = state + k2[t, :, :, None] * v2[t, :, None]
        outputs.append(torch.einsum("hk,hkv->hv", r[t], state))
    eps = config["head_dim"] * config["norm_eps"]
    o = torch.stack(outputs).view(T, C)
    o = F.group_norm(o, H, p["g_norm.weight"], p["g_norm.bias"], eps)
    o = o + ((r * k2 * p["r_k"]).sum(-1, keepdim=True) * v2).view(T, C)
    return (o * g) @ p["o_proj.weight"].T, v if first is None else first


@torch.no_grad()
def logits(weights: dict, config: dict, tokens: list[int]) -> torch.Tensor:
    """fla/models/rwkv7/modeling_rwkv7.py. Logits (T, V)."""

    def norm(x, p, name):
        return F.layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-5)

    x, first = weights["model.embeddings.weight"][tokens], None
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        p = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
        x = norm(x, p, "pre_norm") if layer == 0 else x
        own = {n.removeprefix("attn."): t for n, t in p.items()}
        y, first = attention(norm(x, p, "attn_norm"), first, own, config)
        x = x + y
        h = norm(x, p, "ffn_norm")
        key = (h + (shifted(h) - h) * p["ffn.x_k"]) @ p["ffn.key.weight"].T
        x = x + key.relu().square() @ p["ffn.value.weight"].T
    return norm(x, weights, "model.norm") @ weights["lm_head.weight"].T


def test_fla_computes_the_same(tmp_path):
    sizes = {"n_layer": 3, "n_embd": 128, "head_size": 64, "dim_gate_lora": 9, "dim_value_lora": 5}
    base = save_model(small_model(**sizes, generation=7), tmp_path / "base.pth")
    write(FORMS["fla"], read_base(base), tmp_path / "out", Settings("fp32", "small"))
    tokens = [3, 77, 200, 5, 5, 91]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    found = logits(load_file(tmp_path / "out" / "model.safetensors"), config, tokens)
    expected = load_model(base)(torch.tensor([tokens]))[0][0].detach()
    assert relative_error(found, expected) < 1e-5
