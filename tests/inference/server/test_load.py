"""Many clients at once, some of which misbehave."""

import asyncio
import json
import socket
import time

import httpx
import openai
import pytest
import torch
from helpers.serving import serving
from helpers.support import save_model, small_model

from finchtune.inference.engine import Engine, Request
from finchtune.tokenizer import BytesTokenizer

N_CLIENTS, N_ROUNDS, N_TOKENS = 64, 3, 24


@pytest.fixture(scope="module")
def model():
    """One that never ends a document, so that a long text is long."""
    model = small_model()
    with torch.no_grad():
        model.ln_out.bias[0] = 10
        model.head.weight[0, 0] = -50
    return model


@pytest.fixture(scope="module")
def address(model, tmp_path_factory):
    path = save_model(model, tmp_path_factory.mktemp("served") / "base.pth")
    # Few rows, so that most wait.
    with serving("--model", path, "--max_rows", 16, "--max_tokens", 100_000) as address:
        yield address


def prompt_of(i, round_):
    return f"{i} and {round_} " * (1 + i % 7)


def expected_texts(model):
    engine = Engine(model, BytesTokenizer())
    rows = {
        (i, round_): engine.submit(Request(list(prompt_of(i, round_).encode()), N_TOKENS))
        for i in range(N_CLIENTS)
        for round_ in range(N_ROUNDS)
    }
    while not engine.idle:
        engine.step()
    return {key: row.text for key, row in rows.items()}


async def one_client(client, i):
    """A client's texts, streamed to every second one."""
    texts = {}
    for round_ in range(N_ROUNDS):
        asked = {"prompt": prompt_of(i, round_), "max_tokens": N_TOKENS, "temperature": 0}
        found = await client.completions.create(model="base", stream=bool(i % 2), **asked)
        if i % 2:
            texts[i, round_] = "".join([chunk.choices[0].text async for chunk in found])
        else:
            texts[i, round_] = found.choices[0].text
    return texts


async def all_clients(address):
    limits = httpx.Limits(max_connections=N_CLIENTS)
    async with openai.AsyncOpenAI(
        base_url=address,
        api_key="none",
        max_retries=0,
        http_client=httpx.AsyncClient(limits=limits, timeout=300),
    ) as client:
        answers = await asyncio.gather(*(one_client(client, i) for i in range(N_CLIENTS)))
    return {key: text for texts in answers for key, text in texts.items()}


def raw_request(address, stream, n_tokens=50_000, missing=0):
    """A connection on which a long text was asked for, but for the last `missing` bytes."""
    url = httpx.URL(address)
    body = json.dumps({"prompt": "a", "max_tokens": n_tokens, "stream": stream}).encode()
    connection = socket.create_connection((url.host, url.port))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        + f"Content-Length: {len(body) + missing}\r\n\r\n".encode()
        + body
    )
    return connection


def test_no_answer_is_lost_or_mixed(address, model):
    assert asyncio.run(all_clients(address)) == expected_texts(model)


def test_slow_readers_and_closed_connections_harm_nobody(address, model):
    """More of them than there are rows: those that close give theirs back."""
    slow = [raw_request(address, stream=True) for _ in range(4)]
    for stream in [True, False] * 16:
        connection = raw_request(address, stream)
        if stream:
            connection.recv(100)
        connection.close()
    for _ in range(8):
        raw_request(address, True, missing=10).close()
    assert asyncio.run(all_clients(address)) == expected_texts(model)
    for connection in slow:
        connection.close()
    wait_until_idle(address)


def wait_until_idle(address, seconds=60):
    """Until no text is asked for: those whose readers are gone were dropped."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if httpx.get(address.replace("/v1", "/health")).json()["texts"] == 0:
            return
        time.sleep(0.2)
    raise AssertionError("texts that nobody waits for are still written")
