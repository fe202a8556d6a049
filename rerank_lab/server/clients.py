"""The forms of other services: requests of Cohere, Jina, Voyage and TEI clients become a Call, and a Ranking becomes the answer that they expect.

The model in a request decides the method: a bi-encoder runs fast, a late-interaction model maxsim, a cross-encoder standard. Without a model, the server's first one runs.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, field_validator
from pydantic_core import PydanticCustomError

from rerank_lab.methods import make_method
from rerank_lab.reranker import Ranking
from rerank_lab.server.contract import MAX_INT64, Call, Count, RequestDocument, answer_items, document_kind, invalid, not_blank, not_too_many, validate
from rerank_lab.server.service import Service

NOT_A_FIELDS_DOCUMENT = "Input should be a valid string or an object"
FieldsDocument = Annotated[
    Annotated[str, Tag("string")] | Annotated[dict[str, Any], Tag("object")],
    Discriminator(document_kind, custom_error_type="document_type", custom_error_message=NOT_A_FIELDS_DOCUMENT),
]
BETWEEN_FIELDS = "\n"
BI_METHOD, LATE_METHOD, CROSS_METHOD = "fast", "maxsim", "standard"


class QueryRequest(BaseModel):
    """The fields that all requests share. Keys that are not listed are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    query: str = Field(description="Holds at least one character that is not blank.")

    _blank = field_validator("query")(not_blank)


class ClientOptions(QueryRequest):
    """The fields that Cohere, Jina and Voyage clients send beside the documents."""

    model: str | None = Field(
        None,
        description=f"A bi-encoder runs {BI_METHOD}, a late-interaction model {LATE_METHOD}, a cross-encoder {CROSS_METHOD}; none: the server's first model.",
    )
    top_n: Count | None = Field(None, description="Results wanted; more than there are: all of them.")
    top_k: Count | None = Field(None, description="The same, as Voyage calls it; top_n wins.")
    return_documents: bool | None = Field(None, description="Echo each document, a string as an object that holds it under `text`.")
    max_tokens_per_doc: Count | None = Field(None, description="A document's own tokens; longer ones are cut, also to the model's own limit.")
    max_doc_length: Count | None = Field(None, description="The same, as Jina calls it; max_tokens_per_doc wins.")
    max_chunks_per_doc: Count | None = Field(None, description="Documents are not read in chunks: more than 1 refuses those that the model cannot read whole.")
    truncation: bool | None = Field(None, description="False refuses texts that the model cannot read whole.")

    @property
    def forbids_cut(self) -> str:
        """The name of the field that forbids cutting long texts; "": none does."""
        return "truncation" if self.truncation is False else "max_chunks_per_doc" if (self.max_chunks_per_doc or 1) > 1 else ""


class ClientRequest(ClientOptions):
    """Body of POST /v1/rerank (Cohere, Jina, Voyage), /v2/rerank (Cohere) and, with `documents`, /rerank."""

    documents: Annotated[list[RequestDocument], Field(min_length=1), BeforeValidator(not_too_many)] = Field(
        description="Texts, or objects whose text stands under `text`. Blank and repeated ones are fine."
    )
    rank_fields: Annotated[list[str], Field(max_length=0)] | None = Field(None, description="None: `text` alone.")


class FieldsRequest(ClientOptions):
    """The same where the client says which fields of its documents are read."""

    documents: Annotated[list[FieldsDocument], Field(min_length=1), BeforeValidator(not_too_many)] = Field(
        description="Texts, or objects that hold a string under each name in rank_fields."
    )
    rank_fields: Annotated[list[str], Field(min_length=1, json_schema_extra={"uniqueItems": True})] = Field(
        description="Fields of the documents that are objects, read in this order, each on a line of its own."
    )

    @field_validator("rank_fields")
    @classmethod
    def _once(cls, names: list[str]) -> list[str]:
        if len(set(names)) < len(names):
            raise PydanticCustomError("repeated", "List should name each field once")
        return names

    def texts(self) -> list[str]:
        """The text of each document that is read: its fields in rank_fields, joined.

        Raises:
            Refusal: 422, a document lacks a field. If it were skipped, a misspelled name would silently change scores.
        """
        return [d if isinstance(d, str) else self._text(d, place) for place, d in enumerate(self.documents)]

    def _text(self, document: dict[str, Any], place: int) -> str:
        values: list[str] = []
        for n, name in enumerate(self.rank_fields):
            value = document.get(name)
            if not isinstance(value, str):
                error = "string_type" if name in document else "missing"
                raise invalid(["documents", place], f"Input should have a string under the name that rank_fields[{n}] gives", error)
            values.append(value)
        return BETWEEN_FIELDS.join(values)


class TEIRequest(QueryRequest):
    """Body of POST /rerank, as text-embeddings-inference has it."""

    model: Any = Field(None, description="TEI has no such field: what is no known id is ignored. A known one is used as by the other routes.")
    texts: Annotated[list[str], Field(min_length=1), BeforeValidator(not_too_many)] = Field(description="Blank and repeated ones are fine.")
    raw_scores: bool | None = Field(None, description="Scores before they are mapped to what is shown.")
    return_text: bool | None = Field(None, description="Echo each text.")
    truncate: bool | None = Field(None, description="False refuses texts that the model cannot read whole.")
    truncation_direction: Literal["Right", "right", "Left", "left"] | None = Field(
        None, description="Long texts lose their end: Left refuses texts that the model cannot read whole."
    )

    @property
    def forbids_cut(self) -> str:
        """The name of the field that forbids cutting the end of long texts; "": none does."""
        return "truncate" if self.truncate is False else "truncation_direction" if self.truncation_direction in ("Left", "left") else ""


def read_client(service: Service, data: Any) -> Call:
    """Makes a call of the JSON of a Cohere, Jina or Voyage client.

    Raises:
        Refusal: 422, the JSON breaks the schema.
    """
    request: ClientRequest | FieldsRequest
    if isinstance(data, dict) and data.get("rank_fields"):
        request = validate(FieldsRequest, data, service.settings.max_documents)
        texts = request.texts()
    else:
        request = validate(ClientRequest, data, service.settings.max_documents)
        texts = [d if isinstance(d, str) else d.text for d in request.documents]
    sent = [{"text": d} if isinstance(d, str) else d for d in data["documents"]]
    echo = [orjson.dumps(d) for d in sent] if request.return_documents else None
    most = request.max_tokens_per_doc or request.max_doc_length
    return _call(service, request.model, request.query, texts, echo, request.forbids_cut, request.top_n or request.top_k, most)


def read_any(service: Service, data: Any) -> Call:
    """Makes a call of the JSON that came to /rerank: `texts` means a TEI client, `documents` a Jina client.

    Raises:
        Refusal: 422, the JSON breaks the schema.
    """
    if isinstance(data, dict) and not data.keys() & {"texts", "documents"}:
        raise invalid(["texts"], "Field required, or documents", "missing")
    if not isinstance(data, dict) or "texts" not in data:
        return read_client(service, data)
    request = validate(TEIRequest, data, service.settings.max_documents)
    echo = [orjson.dumps(text) for text in request.texts] if request.return_text else None
    model = request.model if isinstance(request.model, str) and request.model in service.roles else None
    return _call(service, model, request.query, request.texts, echo, request.forbids_cut, form="tei-raw" if request.raw_scores else "tei")


def answer_v1(call: Call, ranking: Ranking) -> bytes:
    """The answer of /v1/rerank. One body serves Cohere's first API and Jina (`results`, documents as objects) and Voyage (`data`, documents as strings)."""
    results = _results(call, ranking)
    data = results if call.documents is None else [result | {"document": call.texts[result["index"]]} for result in results]
    usage = {"total_tokens": ranking.tokens, "prompt_tokens": ranking.tokens}
    return orjson.dumps({"id": str(uuid.uuid4()), "object": "list", "model": call.model, "results": results, "data": data, "usage": usage, "meta": _meta("1")})


def answer_v2(call: Call, ranking: Ranking) -> bytes:
    """The answer of /v2/rerank: the body of Cohere's second API."""
    return orjson.dumps({"id": str(uuid.uuid4()), "results": _results(call, ranking), "meta": _meta("2") | {"tokens": {"input_tokens": ranking.tokens}}})


def answer_any(call: Call, ranking: Ranking) -> bytes:
    """The answer of /rerank: TEI's form for a TEI client, otherwise Jina's."""
    if not call.form.startswith("tei"):
        return answer_v1(call, ranking)
    found = answer_items(ranking, None)
    scores = dict(zip(ranking.order, ranking.scores.tolist())) if call.form == "tei-raw" else {one.index: one.relevance_score for one in found}
    results: list[dict[str, Any]] = [{"index": one.index, "score": scores[one.index]} for one in found]
    return orjson.dumps(results if call.documents is None else [result | {"text": call.texts[result["index"]]} for result in results])


def _results(call: Call, ranking: Ranking) -> list[dict[str, Any]]:
    """Index and score of each result in order, with the document as an object if documents are echoed."""
    echo = call.documents
    return [
        {"index": one.index, "relevance_score": one.relevance_score} | ({} if echo is None else {"document": orjson.Fragment(echo[one.index])})
        for one in answer_items(ranking, call.top_n)
    ]


def _meta(version: str) -> dict[str, Any]:
    return {"api_version": {"version": version}, "billed_units": {"search_units": 1}}


def _call(
    service: Service,
    named: str | None,
    query: str,
    texts: list[str],
    echo: list[bytes] | None,
    forbids_cut: str,
    top_n: int | None = None,
    max_tokens: int | None = None,
    form: str = "",
) -> Call:
    model = service.settings.default_model if named is None else named
    crossing = service.roles.get(model) == "cross-encoder"
    method = make_method(CROSS_METHOD if crossing else BI_METHOD if service.pools(model) else LATE_METHOD)
    most = max_tokens or (MAX_INT64 if forbids_cut else 512)
    return Call(model, query, texts, method, echo, model if crossing else None, top_n, most, form=form, forbids_cut=forbids_cut)
