"""The server as OpenAI's own client sees it."""

import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from helpers.serving import serving
from helpers.support import save_model, small_model

import finchtune
from finchtune.adapters import adapter_state, attach
from finchtune.data import templates
from finchtune.files import sha256
from finchtune.inference.conversation import content_of
from finchtune.inference.engine import Engine, Request
from finchtune.inference.sampling import Sampling
from finchtune.tokenizer import BytesTokenizer
from finchtune.weights.adapter_files import save_adapter

TOKENIZER, CHAT = BytesTokenizer(), templates.get("chat")
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model, and an adapter of it that was trained with a template of its own."""
    folder = tmp_path_factory.mktemp("served")
    base = save_model(small_model(), folder / "base.pth")
    model = attach(finchtune.load_model(base), "bone", r=8)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    record = {
        "adapter": model.adapter_spec,
        "base": {"file": "base.pth", "sha256": sha256(base)},
        "template": templates.get("metamath").record(),
    }
    save_adapter(adapter_state(model), record, folder / "maths.pth")
    return folder


@pytest.fixture(scope="module")
def address(folder):
    flags = ["--model", folder / "base.pth", "--max_tokens", 50]
    with serving(*flags, "--peft_checkpoint", folder / "maths.pth") as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def written(folder, prompt, n=12, adapter=False, stop=(), **sampling):
    """What the engine writes without a server."""
    model = finchtune.load_model(folder / "base.pth").eval()
    if adapter:
        from finchtune.weights.writing import writing_model

        model = writing_model(folder / "base.pth", folder / "maths.pth")
    engine = Engine(model, TOKENIZER)
    request = Request(TOKENIZER.encode(prompt), n, Sampling(**sampling), stop_strings=stop)
    row = engine.submit(request)
    while not engine.idle:
        engine.step()
    return row


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["base", "maths"]
    assert client.models.retrieve("maths").id == "maths"
    with pytest.raises(openai.NotFoundError, match="this server has base, maths"):
        client.models.retrieve("other")


def test_completions(client, folder):
    found = client.completions.create(model="base", prompt="Why?", max_tokens=12, temperature=0)
    expected = written(folder, "Why?")
    (choice,) = found.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert found.usage.prompt_tokens == 4
    assert found.usage.completion_tokens == len(expected.tokens)


def test_several_prompts_with_several_texts_each(client, folder):
    settings = {"temperature": 1.5, "top_p": 0.9, "seed": 3}
    found = client.completions.create(
        model="base", prompt=["Why?", "Who?"], n=2, max_tokens=8, **settings
    )
    expected = [
        written(folder, prompt, 8, **settings | {"seed": seed}).text
        for prompt in ("Why?", "Who?")
        for seed in (3, 4)
    ]
    assert [choice.text for choice in found.choices] == expected
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert found.usage.prompt_tokens == 8
    ids = client.completions.create(
        model="base", prompt=[[87, 104, 121, 63]], max_tokens=8, **settings
    )
    assert ids.choices[0].text == expected[0]


@pytest.mark.parametrize("name", ["base", "maths"])
def test_chats_have_the_template_of_their_model(client, folder, name):
    template = templates.get("metamath") if name == "maths" else CHAT
    found = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "Why?"}], max_tokens=12, temperature=0
    )
    prompt = template.prompt("Why?")
    expected = written(folder, prompt, adapter=name == "maths", stop=template.stop)
    message = found.choices[0].message
    assert (message.role, message.content) == ("assistant", content_of(template, expected.text))


def test_streams_join_to_the_whole(client):
    chat = {
        "model": "base",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}],
        "max_tokens": 30,
        "n": 2,
        "seed": 1,
    }
    whole = client.chat.completions.create(**chat)
    texts, ends, last = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(
        **chat, stream=True, stream_options={"include_usage": True}
    ):
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason or ends[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert ends == [choice.finish_reason for choice in whole.choices]
    assert last.usage == whole.usage
    plain = {"model": "base", "prompt": "Why?", "max_tokens": 20, "seed": 1}
    pieces = client.completions.create(**plain, stream=True)
    text = "".join(chunk.choices[0].text for chunk in pieces)
    assert text == client.completions.create(**plain).choices[0].text


def test_stop_texts(client, folder):
    text = written(folder, "Why?", 40).text
    stop = next(text[i] for i in range(8, len(text)) if text[i] != "\ufffd")
    found = client.completions.create(
        model="base", prompt="Why?", max_tokens=40, temperature=0, stop=["never", stop]
    )
    assert found.choices[0].text == text[: text.index(stop)]
    assert found.choices[0].finish_reason == "stop"


def test_settings_beyond_openais(client, folder):
    found = client.completions.create(
        model="base",
        prompt="Why?",
        max_tokens=12,
        temperature=0,
        frequency_penalty=1.5,
        extra_body={"repetition_penalty": 1.5, "penalty_decay": 0.9},
    )
    settings = {"frequency_penalty": 1.5, "repetition_penalty": 1.5, "penalty_decay": 0.9}
    assert found.choices[0].text == written(folder, "Why?", **settings).text


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"temperature": -1}, "temperature must be in"),
        ({"max_tokens": 51}, "above this server's limit of 50"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"n": 0}, "n must be between 1 and 128"),
        ({"prompt": [[300]]}, "token id 300 lies outside"),
        ({"prompt": ["a", 1]}, "prompt must be a text or token ids"),
        ({"prompt": []}, "prompt must be"),
        ({"stop": [""]}, "stop must be"),
        ({"stream": 1}, "stream must be of the type bool"),
        ({"temperature": True}, "temperature must be of the type int or float"),
        ({"logprobs": 5}, "logprobs is not offered"),
        ({"tempeature": 1}, "unknown field 'tempeature'"),
        ({"prompt": "\ud800"}, "lone surrogate"),
    ],
)
def test_what_cannot_be_done_is_refused(address, body, message):
    for stream in (False, True):
        content = json.dumps({"model": "base", "prompt": "a", "stream": stream} | body)
        answer = httpx.post(f"{address}/completions", content=content, headers=JSON)
        assert answer.status_code == 400, answer.text
        assert message in answer.json()["error"]["message"]


def test_http_mistakes_are_told(address):
    url = f"{address}/completions"
    assert httpx.post(url, content="{", headers=JSON).status_code == 400
    assert httpx.post(url, content="[" * 10**5, headers=JSON).status_code == 400
    assert httpx.post(url, content="{}", headers={"content-type": "text/plain"}).status_code == 415
    assert httpx.post(url, content=b" " * (17 << 20), headers=JSON).status_code == 413
    assert httpx.get(url).status_code == 405
    assert httpx.get(f"{address}/nothing").status_code == 404
    assert httpx.get(f"{address}/models", headers={"host": "evil.example"}).status_code == 400
    found = httpx.post(url, json={"model": "other", "prompt": "a"})
    assert found.status_code == 404
    assert "this server has base" in found.json()["error"]["message"]
    messages = [{"role": "wizard", "content": "a"}]
    chat = httpx.post(f"{address}/chat/completions", json={"messages": messages})
    assert "the role 'wizard' is none of" in chat.json()["error"]["message"]
    for body in ({}, {"messages": []}):
        chat = httpx.post(f"{address}/chat/completions", json=body)
        assert chat.status_code == 400
        assert "must be a list of messages" in chat.json()["error"]["message"]


def test_a_text_of_no_numbers_is_an_error_of_the_server_alone(tmp_path):
    model = small_model()
    with torch.no_grad():
        model.ln_out.bias[0] = 10  # never the end of a document
        model.head.weight[0, 0] = -50
        model.emb.weight[ord("!")] = 3e38  # finite in the file, not in the first norm
    path = save_model(model, tmp_path / "base.pth")
    prompts = ["Why?", "Why!", "Who?"]
    with serving("--model", path, "--max_tokens", 50) as address:

        def ask(prompt):
            asked = {"prompt": prompt, "max_tokens": 40, "temperature": 0}
            return httpx.post(f"{address}/completions", json=asked, timeout=60)

        with ThreadPoolExecutor(3) as pool:
            good, bad, other = pool.map(ask, prompts)
    assert (good.status_code, bad.status_code, other.status_code) == (200, 500, 200)
    assert good.json()["usage"]["completion_tokens"] == 40
    error = bad.json()["error"]
    assert error["type"] == "server_error"
    assert "the model computes NaN or infinity instead of a text" in error["message"]
