"""The tokenizer and template of Hugging Face folders, in transformers itself."""

import json
import os
import random
import subprocess
import sys

import pytest
from helpers.exported import write
from helpers.support import save_model, small_model

from finchtune.data import templates
from finchtune.tokenizer import load_tokenizer
from finchtune.weights.base import read_base
from finchtune.weights.forms import FORMS, Settings

TEXTS = [
    *("", " ", "\n\n", "User: Hi\n\nAssistant:", "   def f(x):\n\treturn x\n"),
    "na\u00efve \u8a9e\u308a\u5408\u3046 \U0001f469\u200d\U0001f467 \x00\x7f",
]
LOAD = """
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
texts, messages = json.load(sys.stdin)
ids = [tokenizer(text)["input_ids"] for text in texts]
chat = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
again = [tokenizer.decode(part) for part in ids]
print(json.dumps([ids, again, chat, tokenizer.eos_token_id, len(tokenizer)]))
"""


def in_transformers(folder, texts, messages, cache):
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder)],
        input=json.dumps([texts, messages]),
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def made_up(count):
    """Texts of characters of every length in UTF-8, and of words of the vocabulary."""
    rng, world = random.Random(3), load_tokenizer("world", 65536)
    alphabet = "abc ABC.,\n\t'\"09éßøя語の한😀\u200d"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(60))) for _ in range(count // 2)]
    for _ in range(count // 2):
        texts.append(world.decode(rng.randrange(1, 65530) for _ in range(rng.randrange(20))))
    return texts


@pytest.mark.parametrize("form", ["hf", "fla"])
def test_transformers_gives_our_ids_and_our_prompts(form, tmp_path):
    sizes = {"n_layer": 1, "n_embd": 64, "vocab_size": 65536, "head_size": 64}
    if form == "hf":
        sizes |= {"dim_ffn": 224, "dim_mix_lora": 32, "dim_decay_lora": 64}
    base = save_model(small_model(**sizes), tmp_path / "base.pth")
    world, template = load_tokenizer("world", 65536), templates.get("chat")
    settings = Settings("bf16", "small", world, template)
    write(FORMS[form], read_base(base), tmp_path / "out", settings)
    texts = TEXTS + made_up(1000)
    messages = [{"role": "user", "content": "What is 2+2?"}]
    ids, again, chat, end, size = in_transformers(tmp_path / "out", texts, messages, tmp_path / "c")
    assert ids == [world.encode(text) for text in texts]
    assert again == texts
    assert chat == template.prompt("What is 2+2?")
    assert (end, size) == (0, 65530)
