"""OpenAI's API: what a request's JSON asks for, and the JSON of answers."""

import time
import uuid
from dataclasses import dataclass, field, replace
from typing import Any

from finchtune.data.chat import messages_of
from finchtune.data.templates import Template
from finchtune.data.values import BadRecord
from finchtune.errors import UserError
from finchtune.inference.conversation import encode_turns
from finchtune.inference.engine import Request, Row
from finchtune.inference.sampling import Sampling
from finchtune.tokenizer import Tokenizer

NUMBER = (int, float)
FIELDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "max_tokens": (int,),
    "n": (int,),
    "stream": (bool,),
    "stream_options": (dict,),
    "stop": (str, list),
    "seed": (int,),
    "temperature": NUMBER,
    "top_p": NUMBER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    # beyond OpenAI's API, as other servers have them
    "top_k": (int,),
    "repetition_penalty": NUMBER,
    "penalty_decay": NUMBER,
}
OF_COMPLETIONS = {"prompt": (str, list)}
OF_CHAT = {"messages": (list,), "max_completion_tokens": (int,)}
SAMPLING = (
    *("temperature", "top_p", "top_k", "repetition_penalty"),
    *("presence_penalty", "frequency_penalty", "penalty_decay"),
)
NOT_OFFERED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("logprobs", "echo"), (False, 0)),
    **dict.fromkeys(("logit_bias", "tools", "functions", "suffix", "audio"), ({}, [], "")),
    "best_of": (1,),
    "top_logprobs": (0,),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
}
"""Fields that are refused, but for values (beside null) that ask for nothing."""
WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("parallel_tool_calls", "reasoning_effort", "verbosity", "prediction"),
)
MOST_CHOICES, MOST_PROMPTS, MOST_STOPS = 128, 256, 16


@dataclass
class Asked:
    """One HTTP request: `n` texts for each of `prompts`, in the order of OpenAI's choices."""

    chat: bool
    model: str
    prompts: list[Any]  # texts, lists of ids; for a chat its one list of messages
    n: int
    stream: bool
    with_usage: bool
    max_tokens: int
    sampling: Sampling
    stop: list[str]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def requests(self, tokenizer: Tokenizer, template: Template) -> list[Request]:
        """What the engine is to write. Tokenises, which may take a while."""
        stop = [*self.stop, *(template.stop if self.chat else ())]
        seed = self.sampling.seed
        return [
            Request(
                ids,
                self.max_tokens,
                replace(self.sampling, seed=None if seed is None else seed + i),
                stop_strings=stop,
            )
            for ids in [self._encode(prompt, tokenizer, template) for prompt in self.prompts]
            for i in range(self.n)
        ]

    def _encode(self, prompt: Any, tokenizer: Tokenizer, template: Template) -> list[int]:
        if self.chat:
            return encode_turns(tokenizer, template.turns(prompt, ask=True))
        return tokenizer.encode(prompt) if isinstance(prompt, str) else prompt

    def envelope(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        """An answer, or a chunk of one, around its choices."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}",
            "object": kind + (".chunk" if chunk and self.chat else ""),
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A finished text."""
        content = (
            {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        )
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def delta(self, index: int, text: str | None, finish_reason: str | None) -> dict[str, Any]:
        """A piece of a text; None begins a chat's."""
        if not self.chat:
            return self.choice(index, text or "", finish_reason)
        delta = {"role": "assistant", "content": ""} if text is None else {"content": text}
        if text == "":
            delta = {}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}


def usage(rows: list[Row], n: int) -> dict[str, int]:
    """Tokens read and written; a prompt with `n` texts counts once."""
    read = sum(len(row.request.prompt) for row in rows[::n])
    written = sum(len(row.tokens) for row in rows)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
    }


def parse(body: Any, chat: bool, default_model: str, most_tokens: int) -> Asked:
    """What the JSON `body` of a request asks for. Raises UserError for what cannot be done."""
    if not isinstance(body, dict):
        raise UserError("the body must be a JSON object")
    fields = FIELDS | (OF_CHAT if chat else OF_COMPLETIONS)
    given = {key: value for key, value in body.items() if value is not None}
    for key, value in given.items():
        _check_field(key, value, fields)
    max_tokens = given.get("max_completion_tokens", given.get("max_tokens"))
    if max_tokens is None:
        max_tokens = most_tokens if chat else min(16, most_tokens)  # 16 is OpenAI's
    if max_tokens > most_tokens:
        raise UserError(f"max_tokens {max_tokens} is above this server's limit of {most_tokens}")
    n = given.get("n", 1)
    if not 1 <= n <= MOST_CHOICES:
        raise UserError(f"n must be between 1 and {MOST_CHOICES}, not {n}")
    settings = {key: given[key] for key in SAMPLING if key in given}
    sampling = Sampling(**{"temperature": 1.0, "seed": given.get("seed"), **settings})
    return Asked(
        chat,
        given.get("model", default_model),
        [_messages(given)] if chat else _prompts(given.get("prompt", "")),
        n,
        given.get("stream", False),
        bool(given.get("stream_options", {}).get("include_usage")),
        max_tokens,
        sampling,
        _stop(given.get("stop", [])),
    )


def _check_field(key: str, value: Any, fields: dict[str, tuple[type, ...]]) -> None:
    if key in fields:
        kinds = fields[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{key} must be of the type {names}")
    elif key in NOT_OFFERED:
        if value not in NOT_OFFERED[key]:
            raise UserError(f"{key} is not offered by this server; leave it out")
    elif key not in WITHOUT_EFFECT:
        raise UserError(f"unknown field {key!r}")


def _messages(given: dict[str, Any]) -> list[dict[str, Any]]:
    try:
        return messages_of({"messages": given.get("messages", [])}, "messages")
    except BadRecord as error:
        raise UserError(str(error)) from error


def _prompts(prompt: Any) -> list[Any]:
    """A text, several texts, a list of ids, or several such lists -> a list of texts or lists."""
    if isinstance(prompt, str) or (prompt and all(_is_id(item) for item in prompt)):
        return [prompt]
    good = all(
        isinstance(item, str) or (isinstance(item, list) and all(map(_is_id, item)))
        for item in prompt
    )
    if not good or not 1 <= len(prompt) <= MOST_PROMPTS:
        raise UserError(f"prompt must be a text or token ids, or 1 to {MOST_PROMPTS} of those")
    return prompt


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _stop(stop: Any) -> list[str]:
    texts = [stop] if isinstance(stop, str) else stop
    if len(texts) > MOST_STOPS or not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"stop must be a text or up to {MOST_STOPS} texts, none of them empty")
    return texts
