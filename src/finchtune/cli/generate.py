"""Continue a prompt with a model, streaming."""

import argparse

import torch

from finchtune.data import PROMPT
from finchtune.inference.generate import generate
from finchtune.tokenizer import Decoder, load_tokenizer
from finchtune.weights.base import load_model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="weights, a plain .pth")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", help="text to continue")
    asked.add_argument("--question", help="put as train.py --sft_field question answer puts it")
    parser.add_argument("--tokens", type=int, default=200, help="most tokens to write")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 = always the likeliest")
    parser.add_argument("--top_p", type=float, default=0.7)
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument("--tokenizer", help="world, bytes or a tokenizer.json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)

    dtype = torch.float32 if given.device == "cpu" else None
    model = load_model(given.model, dtype=dtype, device=given.device)
    tokenizer = load_tokenizer(given.tokenizer, model.config.vocab_size)
    decoder = Decoder(tokenizer)
    text = given.prompt if given.question is None else PROMPT.format(question=given.question)
    print(text, end="", flush=True)
    prompt = tokenizer.encode(text)
    for token in generate(model, prompt, given.tokens, given.temperature, given.top_p, given.seed):
        print(decoder.feed(token), end="", flush=True)
    print(decoder.finish(), flush=True)
