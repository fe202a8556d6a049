"""What the Cohere, Jina, Voyage and TEI clients send, as a call, and a ranking as the answer that they expect.

The model that they name decides: a bi-encoder runs fast, a cross-encoder standard; none named: the server's first.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from rerank_lab.methods import make_method
from rerank_lab.reranker import Ranking
from rerank_lab.server.contract import Call, Count, Document, counted, invalid, not_blank, shown, validate
from rerank_lab.server.service import Service


class Asked(BaseModel):
    """What all of them share. Keys that are not listed are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str | None = Field(None, description="A bi-encoder runs fast, a cross-encoder standard; none: the server's first model.")
    query: str = Field(description="Holds at least one character that is not blank.")

    _blank = field_validator("query")(not_blank)


class ClientRequest(Asked):
    """Body of POST /v1/rerank (Cohere, Jina, Voyage), /v2/rerank (Cohere) and, with `documents`, /rerank."""

    documents: Annotated[list[Document], Field(min_length=1), BeforeValidator(counted)] = Field(
        description="Texts, or objects whose text stands under `text`. Blank and repeated ones are fine."
    )
    top_n: Count | None = Field(None, description="Results wanted; more than there are: all of them.")
    top_k: Count | None = Field(None, description="The same, as Voyage calls it; top_n wins.")
    return_documents: bool | None = Field(None, description="Echo each document, a string as an object that holds it under `text`.")
    max_tokens_per_doc: Count | None = Field(None, description="A document's own tokens; longer ones are cut, also to the model's own limit.")


class TEIRequest(Asked):
    """Body of POST /rerank, as text-embeddings-inference has it."""

    texts: Annotated[list[str], Field(min_length=1), BeforeValidator(counted)] = Field(description="Blank and repeated ones are fine.")
    raw_scores: bool | None = Field(None, description="Scores before they are mapped to what is shown.")
    return_text: bool | None = Field(None, description="Echo each text.")


def read_client(service: Service, data: Any) -> Call:
    """A call from what a Cohere, Jina or Voyage client sends."""
    asked = validate(ClientRequest, data, service.settings.max_documents)
    texts = [d if isinstance(d, str) else d.text for d in asked.documents]
    sent = [{"text": d} if isinstance(d, str) else d for d in data["documents"]]
    echo = [orjson.dumps(d) for d in sent] if asked.return_documents else None
    return _call(service, asked, texts, echo, asked.top_n or asked.top_k, asked.max_tokens_per_doc or 512)


def read_any(service: Service, data: Any) -> Call:
    """A call from what is sent to /rerank: with `texts` by a TEI client, with `documents` by a Jina client."""
    if isinstance(data, dict) and not data.keys() & {"texts", "documents"}:
        raise invalid(["texts"], "Field required, or documents", "missing")
    if not isinstance(data, dict) or "texts" not in data:
        return read_client(service, data)
    asked = validate(TEIRequest, data, service.settings.max_documents)
    echo = [orjson.dumps(text) for text in asked.texts] if asked.return_text else None
    return _call(service, asked, asked.texts, echo, None, 512, form="tei-raw" if asked.raw_scores else "tei")


def answer_v1(call: Call, ranking: Ranking) -> bytes:
    """One body for Cohere's first API, Jina (`results`, documents as objects) and Voyage (`data`, documents as strings)."""
    results = _results(call, ranking)
    data = results if call.documents is None else [result | {"document": call.texts[result["index"]]} for result in results]
    usage = {"total_tokens": ranking.tokens, "prompt_tokens": ranking.tokens}
    return orjson.dumps({"id": str(uuid.uuid4()), "object": "list", "model": call.model, "results": results, "data": data, "usage": usage, "meta": _meta("1")})


def answer_v2(call: Call, ranking: Ranking) -> bytes:
    """The body of Cohere's second API."""
    return orjson.dumps({"id": str(uuid.uuid4()), "results": _results(call, ranking), "meta": _meta("2") | {"tokens": {"input_tokens": ranking.tokens}}})


def answer_any(call: Call, ranking: Ranking) -> bytes:
    """As TEI answers where TEI asked, else as Jina does."""
    if not call.form.startswith("tei"):
        return answer_v1(call, ranking)
    found = shown(ranking, None)
    scores = dict(zip(ranking.order, ranking.scores.tolist())) if call.form == "tei-raw" else {one.index: one.relevance_score for one in found}
    results: list[dict[str, Any]] = [{"index": one.index, "score": scores[one.index]} for one in found]
    return orjson.dumps(results if call.documents is None else [result | {"text": call.texts[result["index"]]} for result in results])


def _results(call: Call, ranking: Ranking) -> list[dict[str, Any]]:
    """Documents in their order, each as an object where they are echoed."""
    echo = call.documents
    return [
        {"index": one.index, "relevance_score": one.relevance_score} | ({} if echo is None else {"document": orjson.Fragment(echo[one.index])})
        for one in shown(ranking, call.top_n)
    ]


def _meta(version: str) -> dict[str, Any]:
    return {"api_version": {"version": version}, "billed_units": {"search_units": 1}}


def _call(service: Service, asked: Asked, texts: list[str], echo: list[bytes] | None, top_n: int | None, max_tokens: int, form: str = "") -> Call:
    model = asked.model if asked.model is not None else service.settings.default_model
    crossing = service.roles.get(model) == "cross-encoder"
    method = make_method("standard" if crossing else "fast")
    return Call(model, asked.query, texts, method, echo, model if crossing else None, top_n, max_tokens, form=form)
