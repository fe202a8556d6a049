"""The contract for machines, as an OpenAPI document: every field, every status that can occur, the ids for each role, and examples that run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from rerank_lab.methods import METHODS, settings_of
from rerank_lab.server.clients import ClientRequest, FieldsRequest, TEIRequest
from rerank_lab.server.contract import DEFAULT, STAGE1, RerankRequest
from rerank_lab.server.service import Service

QUERY = "How are two tables joined on a key?"
DOCUMENTS = ["Merge DataFrame objects with a database-style join.", {"text": "Sort by the values along either axis.", "id": 7}]
# A character that str.strip keeps. It is spelled out because dialects of regular expressions differ in \s.
NOT_BLANK = r"[^\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
TEXT = {"type": "string"}
COUNT = {"type": "integer", "minimum": 0}
SCORE = {"type": "number"}
ERROR_STATUSES = {
    400: "No HTTP.",
    401: "No token, another scheme, or an unknown token.",
    404: "No such model; the known ids stand in the message.",
    413: "The body is too large.",
    415: "The body is encoded otherwise than by gzip.",
    422: "The body is not what the schema says, or a model has another role or lacks what the method compares.",
    429: "The queue is full.",
    500: "A model failed or gave a NaN; the message names it.",
    503: "Loading or draining.",
    504: "No answer before the deadline.",
}
HEADERS = {401: "WWW-Authenticate", 415: "Accept-Encoding", 429: "Retry-After", 503: "Retry-After"}


def obj(required: dict[str, Any], optional: dict[str, Any] | None = None, *, closed: bool = True) -> dict[str, Any]:
    """The schema of an object; closed: it has no other keys."""
    return {"type": "object", "required": list(required), "properties": required | (optional or {}), "additionalProperties": not closed}


def array(items: dict[str, Any]) -> dict[str, Any]:
    """The schema of a list."""
    return {"type": "array", "items": items}


def header(name: str, description: str) -> dict[str, Any]:
    """The parameter for a header that a client may send."""
    return {"name": name, "in": "header", "required": False, "description": description, "schema": TEXT}


def count_in_words(count: int, thing: str) -> str:
    """A number in words: "four methods"."""
    words = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    return f"{words[count] if count < len(words) else count} {thing}{'' if count == 1 else 's'}"


def description() -> str:
    """The description of the API."""
    methods = count_in_words(len(METHODS), "method")
    return f"Reranks documents for a query by one of {methods}. The routes beside it speak to the clients of Cohere, Jina, Voyage and TEI."


ERROR = obj({"detail": TEXT})
INVALID = obj({"detail": array(obj({"loc": array({"anyOf": [TEXT, {"type": "integer"}]}), "msg": TEXT, "type": TEXT}))})
META = obj({"api_version": obj({"version": TEXT}), "billed_units": obj({"search_units": COUNT})}, {"tokens": obj({"input_tokens": COUNT})})
RESULT_FIELDS: dict[str, Any] = {"index": COUNT, "relevance_score": SCORE}
AS_OBJECT = {"document": obj({"text": TEXT}, closed=False)}
V1 = obj(
    {
        "id": TEXT, "object": TEXT, "model": TEXT, "results": array(obj(RESULT_FIELDS, AS_OBJECT)), "data": array(obj(RESULT_FIELDS, {"document": TEXT})),
        "usage": obj({"total_tokens": COUNT, "prompt_tokens": COUNT}), "meta": META,
    }
)  # fmt: skip
ANSWERS: dict[str, dict[str, Any]] = {
    "rerank_v3": obj(
        {
            "results": array(obj(RESULT_FIELDS, {"document": {"anyOf": [TEXT, {"type": "object"}]}})),
            "meta": obj({"method": TEXT, "deployed_model_id": TEXT}, {"model_cross": TEXT, "stage1_top_k": COUNT}),
        }
    ),
    "rerank_v2": obj({"id": TEXT, "results": array(obj(RESULT_FIELDS, AS_OBJECT)), "meta": META}),
    "rerank_v1": V1,
    "rerank": {"anyOf": [array(obj({"index": COUNT, "score": SCORE}, {"text": TEXT})), V1]},
    "health": obj({"status": TEXT}),
    "ready": obj({"status": TEXT}),
    "models": obj(
        {
            "models": array(
                obj({"id": TEXT, "role": TEXT, "score_scale": TEXT, "token_limit": COUNT, "dimensions": COUNT}, {"token_dimensions": COUNT, "alias_of": TEXT})
            )
        }
    ),
}


class ServerContract:
    """The contract of one server.

    Args:
        service: has the ids, limits and keys.
    """

    def __init__(self, service: Service):
        self.service = service
        self.models, self.crosses = service.ids("bi-encoder"), service.ids("cross-encoder")

    def responses(self, name: str) -> dict[int | str, dict[str, Any]]:
        """Status → response, for the route of this name."""
        content = {"text/plain": {"schema": TEXT}} if name == "metrics" else {"application/json": {"schema": ANSWERS[name]}}
        found: dict[int | str, dict[str, Any]] = {200: {"description": "Done.", "content": content}}
        for status in ERROR_STATUSES if name.startswith("rerank") else [503] if name in ("ready", "models") else []:
            if status == 401 and self.service.settings.keys is None:
                continue
            schema = INVALID if status == 422 else ERROR
            found[status] = {"description": ERROR_STATUSES[status], "content": {"application/json": {"schema": schema}}}
            if status in HEADERS:
                found[status]["headers"] = {HEADERS[status]: {"schema": TEXT, "required": True}}
        for response in found.values():
            response.setdefault("headers", {})["X-Request-ID"] = {"schema": TEXT, "required": True}
        return found

    def operation(self, name: str) -> dict[str, Any]:
        """The parts of a route's operation that FastAPI cannot know: body, headers and security."""
        bodies = {"rerank_v3": self._v3, "rerank_v1": self._client, "rerank_v2": self._client, "rerank": self._any}
        schema, examples = bodies[name]()
        named = {key: {"value": value} for key, value in examples.items()}
        body = {"required": True, "content": {"application/json": {"schema": schema, "examples": named}}}
        sent = [header("X-Request-ID", "1 to 128 visible ASCII characters: the answer and the log carry it; else they carry a new one.")]
        if name == "rerank_v3":
            sent.append(header("X-Provider", "Accepted and ignored."))
        return {"requestBody": body, "parameters": sent} | ({} if self.service.settings.keys is None else {"security": [{"key": []}]})

    def document(self, app: FastAPI) -> Callable[[], dict[str, Any]]:
        """A function to use as app.openapi: it returns the document, made at the first call."""

        def made() -> dict[str, Any]:
            if app.openapi_schema is None:
                app.openapi_schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
                for route in app.routes:  # FastAPI drops defaults of null, and may turn limits into floats, which changes 2**63 - 1
                    if isinstance(route, APIRoute) and route.openapi_extra:
                        app.openapi_schema["paths"][route.path]["post"] |= route.openapi_extra
                if self.service.settings.keys is not None:
                    schemes = {"key": {"type": "http", "scheme": "bearer"}}
                    app.openapi_schema.setdefault("components", {})["securitySchemes"] = schemes
            return app.openapi_schema

        return made

    def _schema(self, kind: type[BaseModel]) -> dict[str, Any]:
        """The schema of a request, with the limits that the command line sets."""
        plain = kind.model_json_schema()
        schema: dict[str, Any] = _inlined(plain, plain.pop("$defs", {}))
        schema["properties"]["query"]["pattern"] = NOT_BLANK
        for name in ("documents", "texts"):
            if name in schema["properties"]:
                schema["properties"][name]["maxItems"] = self.service.settings.max_documents
        return schema

    def _v3(self) -> tuple[dict[str, Any], dict[str, Any]]:
        schema = self._schema(RerankRequest)
        any_id, model, cross = ({"enum": ids} for ids in (self.models + self.crosses, self.models, self.crosses))
        for name in ("model", "model_cross", "method"):
            about = schema["properties"].pop(name)
            schema["description"] += f"\n\n`{name}`: {about['description']}"
        schema["required"] = ["query", "documents"]
        staged = next((name for name, kind in METHODS.items() if STAGE1 in settings_of(kind)), "")
        own: dict[str, dict[str, Any]] = {staged: {STAGE1: 100}, DEFAULT: {"top_n": 1, "return_documents": True}}
        whole, examples = [], {}
        for name, kind in METHODS.items():
            if not all(self.service.ids(role) for role in kind.roles):
                continue
            required: dict[str, Any] = {} if name == DEFAULT else {"method": {"const": name}}
            optional: dict[str, Any] = {"method": {"const": name, "default": name}} if name == DEFAULT else {}
            required["model"] = model if "bi-encoder" in kind.roles else any_id
            if "cross-encoder" in kind.roles:
                required["model_cross"] = cross
            else:
                optional["model_cross"] = {"enum": [*self.crosses, None]} if kind.optional_cross else {"type": ["string", "null"]}
            way = obj(schema["properties"] | required, optional, closed=False)
            whole.append(way | {"required": [*schema["required"], *required]})
            examples[name] = {"model": any_id["enum"][0], "query": QUERY, "documents": DOCUMENTS, "method": name} | own.get(name, {})
            if "cross-encoder" in kind.roles:
                examples[name]["model_cross"] = self.crosses[0]
        return {"title": "RerankRequest", "description": schema["description"], "anyOf": whole}, examples

    def _client(self) -> tuple[dict[str, Any], dict[str, Any]]:
        ways = [self._schema(ClientRequest), self._schema(FieldsRequest)]
        for way in ways:
            way["properties"]["model"] = {"enum": [*self.models, *self.crosses, None]}
        return {"anyOf": ways}, {"cohere": {"model": (self.crosses or self.models)[0], "query": QUERY, "documents": DOCUMENTS, "top_n": 1}}

    def _any(self) -> tuple[dict[str, Any], dict[str, Any]]:
        client, examples = self._client()
        for way in client["anyOf"]:
            way["properties"]["texts"] = False
        return {"anyOf": [self._schema(TEIRequest), *client["anyOf"]]}, {
            "tei": {"query": QUERY, "texts": ["Merge two tables.", "Sort rows."]},
            "jina": examples["cohere"],
        }


def _inlined(value: Any, defs: dict[str, Any]) -> Any:
    """A schema with its references replaced by their definitions, without titles and discriminators."""
    if isinstance(value, dict):
        if "$ref" in value:
            return _inlined(defs[value["$ref"].rpartition("/")[2]], defs)
        return {key: _inlined(item, defs) for key, item in value.items() if key not in ("title", "discriminator") or not isinstance(item, (str, dict))}
    return [_inlined(item, defs) for item in value] if isinstance(value, list) else value
