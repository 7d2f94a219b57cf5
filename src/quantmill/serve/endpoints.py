"""The smaller endpoints: embeddings, tokens, models, health, metrics, and what admins may do."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from quantmill.runtime.interface import Floats
from quantmill.runtime.llm import LLM, Job, unit
from quantmill.serve.body import read_model
from quantmill.serve.completions import as_prompts
from quantmill.serve.conversation import tokenize_ids
from quantmill.serve.exchange import Exchange, server_of
from quantmill.serve.logprobs import token_bytes
from quantmill.serve.models import ModelInfo
from quantmill.serve.refusal import invalid
from quantmill.serve.schemas import DetokenizeRequest, EmbeddingRequest, ModelRequest, TokenizeRequest
from quantmill.serve.sse import whole
from quantmill.types import Json


async def embeddings(request: Request) -> Response:
    """POST /v1/embeddings: means of the last hidden states, of length 1."""
    server = server_of(request)
    caller = server.access.caller(request)
    asked = await read_model(request, EmbeddingRequest, server.settings.max_body_bytes)
    exchange = Exchange(server, request.url.path, caller, asked.model, "embd")
    return await whole(request, _embeddings(exchange, asked))


async def _embeddings(exchange: Exchange, asked: EmbeddingRequest) -> Json:
    async with exchange.open() as llm:
        if asked.dimensions not in (None, llm.facts.hidden_size):
            raise invalid(f"this model's embeddings have {llm.facts.hidden_size} dimensions", "dimensions")
        prompts = [await llm.aids(p) for p in as_prompts(asked.input)]
        jobs = [Job(p, client=exchange.caller.name, embed=True) for p in prompts]
        for job in jobs:
            exchange.check_prompt(len(job.prompt))
        vectors = await asyncio.gather(*(_vector(llm, job) for job in jobs))
        data = [
            {"object": "embedding", "index": i, "embedding": _encoded(v, asked.encoding_format)}
            for i, v in enumerate(vectors)
        ]
        usage = {"prompt_tokens": exchange.prompt_tokens, "total_tokens": exchange.prompt_tokens}
        return {"object": "list", "data": data, "model": asked.model, "usage": usage}


async def _vector(llm: LLM, job: Job) -> Floats:
    return unit((await llm.agenerate(job)).embedding)


def _encoded(vector: Floats, form: str) -> Any:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(x) for x in np.asarray(vector, np.float64).round(8)]


async def tokenize(request: Request) -> Response:
    """POST /tokenize: a text or a conversation -> token ids."""
    server = server_of(request)
    caller = server.access.caller(request)
    asked = await read_model(request, TokenizeRequest, server.settings.max_body_bytes)
    async with server.using(asked.model, caller) as llm:
        ids = await tokenize_ids(asked, llm.tokenizer)
        made: Json = {"tokens": ids, "count": len(ids), "max_model_len": llm.facts.context}
        if asked.return_token_strs:
            made["token_strs"] = [token_bytes(t, llm.tokenizer).decode("utf-8", "replace") for t in ids]
    return JSONResponse(made)


async def detokenize(request: Request) -> Response:
    """POST /detokenize: token ids -> text, special tokens included."""
    server = server_of(request)
    caller = server.access.caller(request)
    asked = await read_model(request, DetokenizeRequest, server.settings.max_body_bytes)
    async with server.using(asked.model, caller) as llm:
        wrong = next((t for t in asked.tokens if t >= llm.facts.vocab_size), None)
        if wrong is not None:
            raise invalid(f"token {wrong} is not in the vocabulary of {llm.facts.vocab_size}", "tokens")
        return JSONResponse({"prompt": llm.tokenizer.decode(asked.tokens, skip_special=False)})


async def models(request: Request) -> Response:
    """GET /v1/models"""
    server = server_of(request)
    caller = server.access.caller(request)
    return JSONResponse({"object": "list", "data": [_model(i, caller.admin) for i in server.service.infos()]})


async def model(request: Request) -> Response:
    """GET /v1/models/NAME; the name may have a slash in it."""
    server = server_of(request)
    caller = server.access.caller(request)
    return JSONResponse(_model(server.service.info(request.path_params["name"]), caller.admin))


def _model(info: ModelInfo, admin: bool) -> Json:
    """What OpenAI's clients know, and what we know besides. Only admins see where files lie."""
    more: Json = {"state": info.state, "context": info.context, "quantization": info.parameters}
    more |= {"runtime": info.runtime, "bytes": info.bytes, "users": info.users}
    if admin:
        more |= {"source": info.source, "error": info.error}
    return {"id": info.name, "object": "model", "created": 0, "owned_by": "quantmill", "quantmill": more}


async def load_model(request: Request) -> Response:
    """POST /admin/models/load: also a model that was not named at the start."""
    server = server_of(request)
    server.access.caller(request, admin=True)
    asked = await read_model(request, ModelRequest, server.settings.max_body_bytes)
    return JSONResponse(_model(await server.service.take(asked.model), True))


async def unload_model(request: Request) -> Response:
    """POST /admin/models/unload"""
    server = server_of(request)
    server.access.caller(request, admin=True)
    asked = await read_model(request, ModelRequest, server.settings.max_body_bytes)
    return JSONResponse(_model(await server.service.unload(asked.model, asked.force), True))


async def health(request: Request) -> Response:
    """GET /health: 200 while requests are taken, 503 when the server is about to end."""
    service = server_of(request).service
    states = {i.name: i.state for i in service.infos()}
    broken = [name for name, llm in service.ready() if not llm.engine.alive]
    status = "draining" if service.closing else "degraded" if broken else "ok"
    return JSONResponse({"status": status, "models": states}, 503 if service.closing else 200)


async def metrics(request: Request) -> Response:
    """GET /metrics for Prometheus."""
    server = server_of(request)
    server.access.caller(request)
    text = await asyncio.to_thread(server.metrics.text)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")
