"""The web application: routes, streaming, errors as OpenAI's clients expect them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from finchtune.errors import UserError
from finchtune.inference.conversation import AnswerText
from finchtune.inference.engine import NoText
from finchtune.inference.server.protocol import Asked, parse, usage
from finchtune.inference.server.worker import Busy, Inbox, News, Served, Ticket, Worker

MAX_BODY = 16 << 20  # bytes


class Server:
    """The handlers, around the worker that writes."""

    def __init__(self, worker: Worker, max_tokens: int):
        self.worker, self.max_tokens = worker, max_tokens
        self.default_model = next(iter(worker.served))

    async def models(self, _: HTTPRequest) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": list(map(_described, self.worker.served))})

    async def model(self, request: HTTPRequest) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        self._served(name)
        return JSONResponse(_described(name))

    async def health(self, _: HTTPRequest) -> Response:
        """GET /health: whether texts are written, and how many are asked for."""
        alive = self.worker.thread.is_alive()
        status = {"status": "ok" if alive else "failed", "texts": self.worker.open}
        return JSONResponse(status, 200 if alive else 500)

    async def completions(self, request: HTTPRequest) -> Response:
        """POST /v1/completions."""
        return await self._answer(request, chat=False)

    async def chat(self, request: HTTPRequest) -> Response:
        """POST /v1/chat/completions."""
        return await self._answer(request, chat=True)

    def _served(self, name: str) -> Served:
        if name not in self.worker.served:
            known = ", ".join(self.worker.served)
            raise HTTPException(404, f"there is no model {name!r}; this server has {known}")
        return self.worker.served[name]

    async def _answer(self, request: HTTPRequest, chat: bool) -> Response:
        asked = parse(await _json_of(request), chat, self.default_model, self.max_tokens)
        served = self._served(asked.model)
        requests = await run_in_threadpool(asked.requests, served.tokenizer, served.template)
        self.worker.check(asked.model, requests)
        inbox = Inbox()
        tickets = self.worker.submit(asked.model, requests, inbox)
        answer = Answer(self.worker, asked, served, inbox, tickets)
        return EventStream(answer) if asked.stream else await answer.whole(request)


class Answer:
    """The answer to one HTTP request, from the news in its inbox."""

    def __init__(
        self, worker: Worker, asked: Asked, served: Served, inbox: Inbox, tickets: list[Ticket]
    ):
        self.worker, self.asked, self.inbox, self.tickets = worker, asked, inbox, tickets
        template = served.template if asked.chat else None
        self.texts = [AnswerText(template) for _ in tickets]
        self.rows: list[Any] = [None] * len(tickets)

    async def pieces(self) -> AsyncIterator[News]:
        """News until every text is done. Raises the first error."""
        while not all(self.rows):
            news = await self.inbox.queue.get()
            if news.error is not None:
                raise news.error
            self.rows[news.index] = news.row
            yield news

    def close(self) -> None:
        """What is not written yet is not needed any more."""
        self.worker.close(self.tickets)

    async def whole(self, request: HTTPRequest) -> Response:
        """One JSON object. Where the client has gone meanwhile, the rest is not written."""
        collected = asyncio.ensure_future(self._collect())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({collected, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not collected.done():
                raise ClientDisconnect
        finally:
            gone.cancel()
            collected.cancel()
            self.close()
        choices = [
            self.asked.choice(i, text, row.finish_reason)
            for i, (text, row) in enumerate(zip(collected.result(), self.rows, strict=True))
        ]
        answer = self.asked.envelope(choices, chunk=False)
        return JSONResponse(answer | {"usage": usage(self.rows, self.asked.n)})

    async def _collect(self) -> list[str]:
        texts = [""] * len(self.tickets)
        async for news in self.pieces():
            texts[news.index] += self._released(news)
        return texts

    def _released(self, news: News) -> str:
        text = self.texts[news.index]
        return text.feed(news.text) + (text.finish() if news.row is not None else "")

    async def events(self) -> AsyncIterator[str]:
        """Server-sent events."""
        try:
            if self.asked.chat:
                for i in range(len(self.tickets)):
                    yield self._event([self.asked.delta(i, None, None)])
            async for news in self.pieces():
                text = self._released(news)
                if text:
                    yield self._event([self.asked.delta(news.index, text, None)])
                if news.row is not None:
                    last = self.asked.delta(news.index, "", news.row.finish_reason)
                    yield self._event([last])
            if self.asked.with_usage:
                yield self._event([], usage=usage(self.rows, self.asked.n))
        except Exception as error:  # the status is sent already, so the error becomes an event
            yield f"data: {json.dumps(_error_body(error))}\n\n"
            return
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps(self.asked.envelope(choices, chunk=True) | more)}\n\n"


class EventStream(StreamingResponse):
    """An answer as server-sent events. However it ends, even before it began, nothing is left."""

    def __init__(self, answer: Answer):
        super().__init__(answer.events(), media_type="text/event-stream")
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.close()


def application(worker: Worker, max_tokens: int, hosts: list[str] | None = None) -> Starlette:
    """The application; `hosts` are the names that clients may call it by, None for any.

    Its worker's thread runs while it does.
    """
    server = Server(worker, max_tokens)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await run_in_threadpool(worker.stop)

    # Without the check a page in a browser could reach a server on the loopback address.
    check = [Middleware(TrustedHostMiddleware, allowed_hosts=hosts)] if hosts else []
    return Starlette(
        routes=[
            Route("/health", server.health),
            Route("/v1/models", server.models),
            Route("/v1/models/{name:path}", server.model),
            Route("/v1/completions", server.completions, methods=["POST"]),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
        ],
        middleware=check,
        exception_handlers={
            ClientDisconnect: _gone,
            HTTPException: _failed,
            UserError: _failed,
            Exception: _failed,
        },
        lifespan=lifespan,
    )


async def _json_of(request: HTTPRequest) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "the content type must be application/json")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"the body is above this server's limit of {MAX_BODY} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from error


async def _disconnected(request: HTTPRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _gone(_: HTTPRequest, error: Exception) -> Response:
    return Response(status_code=499)  # which nobody reads


async def _failed(_: HTTPRequest, error: Exception) -> Response:
    return JSONResponse(_error_body(error), _status_of(error))


def _status_of(error: Exception) -> int:
    if isinstance(error, HTTPException):
        return error.status_code
    if isinstance(error, Busy):
        return 503
    return 400 if isinstance(error, UserError) and not isinstance(error, NoText) else 500


def _error_body(error: Exception) -> dict[str, Any]:
    status = _status_of(error)
    message = error.detail if isinstance(error, HTTPException) else str(error)
    kind = "invalid_request_error" if status < 500 else "server_error"
    if not isinstance(error, HTTPException | UserError):  # what a fault of ours says is for the log
        message = "the server failed; its log says more"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _described(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "finchtune"}
