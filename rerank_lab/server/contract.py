"""The v3 contract: what a request may hold, what an answer holds, and what is said of one that breaks it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError, PydanticKnownError

from rerank_lab.methods import METHODS, make_method
from rerank_lab.methods.method import Method
from rerank_lab.reranker import Ranking

AnyModel = TypeVar("AnyModel", bound=BaseModel)
LARGEST = 2**63 - 1
MOST_PARTS = 1 << 20  # a body of 11 million empty lists takes seconds and a gigabyte
DEEPEST = 254  # what orjson writes
NOT_A_DOCUMENT = "Input should be a valid string or an object with a string under 'text'"


class Refusal(Exception):
    """An answer that is no ranking.

    Attributes:
        status: of HTTP.
        detail: what the body says.
        headers: of the answer.
    """

    def __init__(self, status: int, detail: str | list[dict[str, Any]], headers: Mapping[str, str] | None = None):
        super().__init__(f"{status}")
        self.status, self.detail, self.headers = status, detail, dict(headers or {})


def invalid(place: Sequence[str | int], message: str, kind: str) -> Refusal:
    """A 422 with one error, at this place of the body."""
    return Refusal(422, [{"loc": ["body", *place], "msg": message, "type": kind}])


@dataclass(frozen=True)
class Call:
    """One reranking, whichever route asked for it.

    Attributes:
        model, model_cross: as the client named them.
        texts: of the documents.
        documents: as they were sent, in JSON, where they are to be echoed.
        method: with its settings.
        top_n: None: all.
        batch_size: texts of this call in one batch at most; None: as many as fit.
        form: of the answer, where a route has several.
        whole: the request's field that rules out what is done to long texts here, which is to cut off their end; empty: none does.
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
    whole: str = ""

    @property
    def cross(self) -> str | None:
        """The cross-encoder that will be used."""
        return self.model_cross if self.method.uses_cross else None


@dataclass(frozen=True)
class Shown:
    """One document of an answer."""

    index: int
    relevance_score: float


def shown(ranking: Ranking, top_n: int | None) -> list[Shown]:
    """Scores as they are sent, descending; scores that are equal as sent stand in ascending index."""
    pairs = sorted(zip(ranking.order, ranking.relevance.tolist()), key=lambda pair: (-pair[1], pair[0]))
    return [Shown(index, score) for index, score in pairs[:top_n]]


class DocumentObject(BaseModel):
    """A document with fields of its own; `text` is what is read."""

    model_config = ConfigDict(strict=True, extra="allow")
    text: str


def kind(value: Any) -> str | None:
    """What a document is, by name."""
    return "string" if isinstance(value, str) else "object" if isinstance(value, (dict, DocumentObject)) else None


def counted(value: Any, info: ValidationInfo) -> Any:
    """Refuses a list that is too long before anything in it is looked at."""
    most = (info.context or {}).get("max_documents", 1000)
    if isinstance(value, list) and len(value) > most:
        raise PydanticKnownError("too_long", {"field_type": "List", "max_length": most, "actual_length": len(value)})
    return value


def not_blank(value: str) -> str:
    """Refuses a query without anything to look for."""
    if not value.strip():
        raise PydanticCustomError("blank", "String should hold at least one character that is not blank")
    return value


Document = Annotated[
    Annotated[str, Tag("string")] | Annotated[DocumentObject, Tag("object")],
    Discriminator(kind, custom_error_type="document_type", custom_error_message=NOT_A_DOCUMENT),
]
Count = Annotated[int, Field(ge=1, le=LARGEST)]


class RerankRequest(BaseModel):
    """Body of POST /api/v3/inference/reranker. Keys that are not listed are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore")

    model: str = Field(description="Bi-encoder; for method standard it is only looked up.")
    query: str = Field(description="Holds at least one character that is not blank.")
    documents: Annotated[list[Document], Field(min_length=1), BeforeValidator(counted)] = Field(
        description="Texts, or objects whose text stands under `text`. Blank and repeated ones are fine."
    )
    method: Literal["fast", "standard", "optimal", "best"] = Field("fast", description="What scores the documents.")
    model_cross: str | None = Field(None, description="Cross-encoder: required for standard and optimal, joins best where given, ignored for fast.")
    top_n: Count | None = Field(None, description="Results wanted; more than there are: all of them.")
    stage1_top_k: Count = Field(100, description="Documents that stage 1 of optimal and best keeps.")
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
        """What is to be done, from the request and the JSON that it was made of."""
        texts = [d if isinstance(d, str) else d.text for d in self.documents]
        documents = [orjson.dumps(d) for d in data["documents"]] if self.return_documents else None
        method = make_method(self.method, stage1_top_k=self.stage1_top_k)
        return Call(self.model, self.query, texts, method, documents, self.model_cross, self.top_n, self.max_tokens_per_doc, self.batch_size)


def read(body: bytes) -> Any:
    """The JSON of a body.

    Raises:
        Refusal: 422, it is none, nested too deep to be written again, or more lists, objects and fields than a server can make in no time.
    """
    brackets = body.count(b"[") + body.count(b"{")
    if brackets + body.count(b":") > MOST_PARTS and parts(body) > MOST_PARTS:
        raise invalid([], f"Input should hold at most {MOST_PARTS} lists, objects and fields of theirs", "too_many_parts")
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise invalid([], f"Input should be valid JSON: {error.msg} at line {error.lineno} column {error.colno}", "json_invalid") from None
    if brackets > DEEPEST:
        try:
            orjson.dumps(data)
        except orjson.JSONEncodeError:
            raise invalid([], f"Input should be nested at most {DEEPEST} deep", "recursion_loop") from None
    return data


def parts(body: bytes) -> int:
    """How many lists, objects and fields of objects a JSON text holds; what stands in its strings does not count."""
    plain = np.frombuffer(body.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    outside = np.bitwise_xor.accumulate(plain == ord('"')) == 0
    return int(((plain == ord("[")) | (plain == ord("{")) | (plain == ord(":")))[outside].sum())


def validate(schema: type[AnyModel], data: Any, max_documents: int) -> AnyModel:
    """The data as a request.

    Raises:
        Refusal: 422, with the place of every error and never the input.
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
    for one in shown(ranking, call.top_n):
        result: dict[str, Any] = {"index": one.index, "relevance_score": one.relevance_score}
        if call.documents is not None:
            result["document"] = orjson.Fragment(call.documents[one.index])
        results.append(result)
    meta: dict[str, Any] = {"method": call.method.name, "deployed_model_id": call.model}
    if call.cross is not None:
        meta["model_cross"] = call.cross
    if "stage1_top_k" in call.method.settings():
        meta["stage1_top_k"] = call.method.settings()["stage1_top_k"]
    return orjson.dumps({"results": results, "meta": meta})
