"""The v3 contract: the form of a request, the form of an answer, and the errors of a request that breaks the contract."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from rerank_lab.methods import METHODS, Method, make_method, settings_of
from rerank_lab.reranker import Ranking

AnyModel = TypeVar("AnyModel", bound=BaseModel)
MAX_INT64 = 2**63 - 1
DEFAULT = "fast"  # the method of a request that names none
STAGE1 = "stage1_top_k"  # the one setting of methods that v3 knows
MOST_PARTS = 1 << 20  # a body of 11 million empty lists takes seconds and a gigabyte
MOST_NESTED = 254  # orjson writes no deeper nesting
NOT_A_DOCUMENT = "Input should be a valid string or an object with a string under 'text'"


class Refusal(Exception):
    """A request is refused; the exception becomes the answer.

    Attributes:
        status: HTTP status.
        detail: content of the body's `detail`.
        headers: of the answer.
    """

    def __init__(self, status: int, detail: str | list[dict[str, Any]], headers: Mapping[str, str] | None = None):
        super().__init__(f"{status}")
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


def invalid(place: Sequence[str | int], message: str, kind: str) -> Refusal:
    """A Refusal with status 422 and one error at this place of the body."""
    return Refusal(422, [{"loc": ["body", *place], "msg": message, "type": kind}])


@dataclass(frozen=True)
class Call:
    """A request to rerank, in one form for all routes.

    Attributes:
        model, model_cross: names as the client gave them.
        query: its text.
        texts: the documents' texts.
        method: with its settings.
        documents: the documents' JSON as it was sent, if it is to be echoed; otherwise None.
        top_n: number of results wanted; None: all.
        max_tokens_per_doc: the most tokens of a document that are read.
        batch_size: the most texts of this call in one batch; None: as many as fit.
        form: form of the answer, if a route has several.
        forbids_cut: name of the request's field that forbids cutting the end of long texts; "": none does.
    """

    model: str
    query: str
    texts: list[str]
    method: Method
    documents: list[bytes] | None = None
    model_cross: str | None = None
    top_n: int | None = None
    max_tokens_per_doc: int = 512
    batch_size: int | None = None
    form: str = ""
    forbids_cut: str = ""

    @property
    def cross(self) -> str | None:
        """The cross-encoder that will be used; None: none."""
        return self.model_cross if self.method.uses_cross else None


@dataclass(frozen=True)
class AnswerItem:
    """One document of an answer."""

    index: int
    relevance_score: float


def answer_items(ranking: Ranking, top_n: int | None) -> list[AnswerItem]:
    """The results to send: highest score first. Scores that are equal when sent are in the order of their index."""
    pairs = sorted(zip(ranking.order, ranking.relevance.tolist()), key=lambda pair: (-pair[1], pair[0]))
    return [AnswerItem(index, score) for index, score in pairs[:top_n]]


class DocumentObject(BaseModel):
    """A document with fields of its own; `text` is what is read."""

    model_config = ConfigDict(strict=True, extra="allow")
    text: str


def document_kind(value: Any) -> str | None:
    """The kind of a document: "string" or "object"; None: the value is no document."""
    return "string" if isinstance(value, str) else "object" if isinstance(value, (dict, DocumentObject)) else None


def not_too_many(value: Any, info: ValidationInfo) -> Any:
    """Refuses a list that is too long before its items are validated."""
    most = (info.context or {}).get("max_documents", 1000)
    if isinstance(value, list) and len(value) > most:
        raise PydanticKnownError("too_long", {"field_type": "List", "max_length": most, "actual_length": len(value)})
    return value


def not_blank(value: str) -> str:
    """Refuses a blank query."""
    if not value.strip():
        raise PydanticCustomError("blank", "String should hold at least one character that is not blank")
    return value


def known_method(value: Any) -> Any:
    """Refuses a value that names no method in the registry. The registry is read at each call."""
    if not isinstance(value, str) or value not in METHODS:
        raise PydanticKnownError("literal_error", {"expected": in_words(map(repr, METHODS), "or")})
    return value


def in_words(items: Iterable[str], last: str = "and") -> str:
    """Joins items for a sentence: "a, b and c"."""
    *rest, end = items
    return f"{', '.join(rest)} {last} {end}" if rest else end


def with_description(words: Callable[[], str]) -> Callable[[dict[str, Any]], None]:
    """For json_schema_extra: adds a description that is made from the registered methods when the schema is made."""
    return lambda schema: schema.update(description=words())


def methods_where(wanted: Callable[[type[Method]], bool]) -> str:
    """Names of the methods that satisfy `wanted`, joined for a sentence; "" if there are none."""
    names = [name for name, kind in METHODS.items() if wanted(kind)]
    return in_words(names) if names else ""


def about_model() -> str:
    """Description of `model`."""
    unread = methods_where(lambda kind: "bi-encoder" not in kind.roles)
    return f"Bi-encoder; for method {unread} it is only looked up." if unread else "Bi-encoder."


def about_cross() -> str:
    """Description of `model_cross`."""
    parts = {
        "required for {}": methods_where(lambda kind: "cross-encoder" in kind.roles),
        "joins {} where given": methods_where(lambda kind: kind.optional_cross),
        "ignored for {}": methods_where(lambda kind: not kind.uses_cross),
    }
    return f"Cross-encoder: {', '.join(words.format(names) for words, names in parts.items() if names)}."


def about_stage1() -> str:
    """Description of `stage1_top_k`."""
    return f"Documents that stage 1 of {methods_where(lambda kind: STAGE1 in settings_of(kind))} keeps."


RequestDocument = Annotated[
    Annotated[str, Tag("string")] | Annotated[DocumentObject, Tag("object")],
    Discriminator(document_kind, custom_error_type="document_type", custom_error_message=NOT_A_DOCUMENT),
]
Count = Annotated[int, Field(ge=1, le=MAX_INT64)]


class RerankRequest(BaseModel):
    """Body of POST /api/v3/inference/reranker. Keys that are not listed are ignored."""

    # Methods are looked up in the registry with each request, so their names are no Literal here.

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str = Field(json_schema_extra=with_description(about_model))
    query: str = Field(description="Holds at least one character that is not blank.")
    documents: Annotated[list[RequestDocument], Field(min_length=1), BeforeValidator(not_too_many)] = Field(
        description="Texts, or objects whose text stands under `text`. Blank and repeated ones are fine."
    )
    method: Annotated[str, BeforeValidator(known_method)] = Field(DEFAULT, description="What scores the documents.")
    model_cross: str | None = Field(None, json_schema_extra=with_description(about_cross))
    top_n: Count | None = Field(None, description="Results wanted; more than there are: all of them.")
    stage1_top_k: Count = Field(100, json_schema_extra=with_description(about_stage1))
    max_tokens_per_doc: Count = Field(512, description="A document's own tokens; longer ones are cut, also to the model's own limit.")
    batch_size: Count | None = Field(None, description="Texts of this request in one batch at most; null: batches are planned by tokens.")
    return_documents: bool = Field(False, description="Echo each document as it was sent.")

    _blank = field_validator("query")(not_blank)

    @model_validator(mode="after")
    def _needs_cross(self) -> RerankRequest:
        if "cross-encoder" in METHODS[self.method].roles and self.model_cross is None:
            error = InitErrorDetails(type="missing", loc=("model_cross",), input=None)
            raise ValidationError.from_exception_data("RerankRequest", [error])
        return self

    def call(self, data: Any) -> Call:
        """Makes a Call of this request and of the JSON that it was made from."""
        texts = [d if isinstance(d, str) else d.text for d in self.documents]
        documents = [orjson.dumps(d) for d in data["documents"]] if self.return_documents else None
        method = make_method(self.method, **{STAGE1: self.stage1_top_k})
        return Call(self.model, self.query, texts, method, documents, self.model_cross, self.top_n, self.max_tokens_per_doc, self.batch_size)


def read(body: bytes) -> Any:
    """Parses the JSON of a body.

    Raises:
        Refusal: 422, the body is not JSON, is nested too deep to be written again, or has too many lists, objects and fields
            for a server to parse quickly.
    """
    brackets = body.count(b"[") + body.count(b"{")
    if brackets + body.count(b":") > MOST_PARTS and parts(body) > MOST_PARTS:
        raise invalid([], f"Input should hold at most {MOST_PARTS} lists, objects and fields of theirs", "too_many_parts")
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid([], f"Input should be valid JSON: {error.msg} at line {error.lineno} column {error.colno}", "json_invalid") from None
    if brackets > MOST_NESTED:
        try:
            orjson.dumps(data)
        except orjson.JSONEncodeError:
            raise invalid([], f"Input should be nested at most {MOST_NESTED} deep", "recursion_loop") from None
    return data


def parts(body: bytes) -> int:
    """Counts the lists, objects and fields of objects in a JSON text. Brackets and colons inside strings do not count."""
    plain = np.frombuffer(body.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    outside = np.bitwise_xor.accumulate(plain == ord('"')) == 0
    return int(((plain == ord("[")) | (plain == ord("{")) | (plain == ord(":")))[outside].sum())


def validate(schema: type[AnyModel], data: Any, max_documents: int) -> AnyModel:
    """Validates JSON against a request's schema.

    Raises:
        Refusal: 422, with the place of every error. It never repeats the input.
    """
    try:
        return schema.model_validate(data, context={"max_documents": max_documents})
    except ValidationError as error:
        _refuse(error)


def _refuse(error: ValidationError) -> NoReturn:
    found = []
    for e in error.errors(include_url=False, include_context=False, include_input=False):
        place = [part for n, part in enumerate(e["loc"]) if not (part in ("string", "object") and n and isinstance(e["loc"][n - 1], int))]
        message = "Input should be an object" if e["type"] == "model_type" else e["msg"]
        found.append({"loc": ["body", *place], "msg": message, "type": e["type"]})
    raise Refusal(422, found) from None


def answer(call: Call, ranking: Ranking) -> bytes:
    """The body of a v3 answer."""
    results = []
    for one in answer_items(ranking, call.top_n):
        result: dict[str, Any] = {"index": one.index, "relevance_score": one.relevance_score}
        if call.documents is not None:
            result["document"] = orjson.Fragment(call.documents[one.index])
        results.append(result)
    meta: dict[str, Any] = {"method": call.method.name, "deployed_model_id": call.model}
    if call.cross is not None:
        meta["model_cross"] = call.cross
    settings = call.method.settings()
    if STAGE1 in settings:
        meta[STAGE1] = settings[STAGE1]
    return orjson.dumps({"results": results, "meta": meta})
