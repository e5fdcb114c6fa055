"""llama.cpp, as the package xllamacpp brings it."""

import json
import urllib.request
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A GGUF in llama.cpp's server, on one thread."""

    def __init__(self, path: Path, adapter: Path | None = None, n_ctx: int = 512):
        import xllamacpp

        asked = xllamacpp.CommonParams()
        asked.model.path = str(path)
        asked.n_ctx, asked.n_parallel, asked.n_gpu_layers = n_ctx, 1, 0
        asked.warmup, asked.verbosity, asked.cpuparams.n_threads = False, 0, 1
        if adapter:
            asked.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = xllamacpp.Server(asked)

    def complete(self, prompt: list[int] | str, n_tokens: int, n_probs: int = 1) -> dict[str, Any]:
        """The likeliest continuation, with each token's id and log-probabilities."""
        found = self.server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": n_tokens,
                "temperature": 0.0,
                "samplers": ["temperature"],
                "n_probs": n_probs,
                "ignore_eos": True,
                "cache_prompt": False,
                "return_tokens": True,
                "verbose": True,
            }
        )
        return json.loads(found) if isinstance(found, str | bytes) else found

    def greedy(self, prompt: list[int], n_tokens: int) -> list[int]:
        """The ids of the likeliest continuation."""
        return self.complete(prompt, n_tokens)["__verbose"]["tokens"]

    def log_probabilities(self, prompt: list[int], n_probs: int) -> dict[int, float] | None:
        """Token -> log-probability of the likeliest next tokens.

        None where the likeliest is a part of a character: llama.cpp then tells nothing.
        """
        told = self.complete(prompt, 1, n_probs)["choices"][0]["logprobs"]
        return {t["id"]: t["logprob"] for t in told["content"][0]["top_logprobs"]} if told else None

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, with nothing added."""
        request = urllib.request.Request(
            f"{self.server.listening_address}/tokenize",
            json.dumps({"content": text, "add_special": False}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["tokens"]
