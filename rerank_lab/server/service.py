"""The service behind the routes: models by their ids, keys, the state of the server, and ranking."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from rerank_lab.errors import ModelError
from rerank_lab.methods import METHODS
from rerank_lab.models.forward import token_budget
from rerank_lab.reranker import Ranking, Reranker
from rerank_lab.server.contract import Call, Refusal, in_words, invalid
from rerank_lab.server.fleet import Fleet
from rerank_lab.server.metrics import Metrics
from rerank_lab.server.scheduler import Job, Scheduler
from rerank_lab.server.steps import Steps

log = logging.getLogger(__name__)
REQUEST: ContextVar[str] = ContextVar("request_id", default="-")
# Of a model's score in its first method: by how an encoder compares, and of a cross-encoder.
SCALES = {
    "cosine": "cosine, -1 to 1",
    "dot": "dot product, without bounds",
    "maxsim": "maxsim, the sum of the query's tokens' largest cosines: at most their number",
}
LOGIT_SCALE = "sigmoid of the logit, 0 to 1"


@dataclass(frozen=True)
class ServerSettings:
    """The settings of a server.

    Attributes:
        keys: keys that requests may carry; None: requests need no key.
        aliases: another name for a model → its id.
        default_model: the model of a request without one, on the routes for other clients.
        max_documents: the most documents of a request.
        max_body: the most bytes of one body. All bodies in memory together may have four times as many.
        max_queue_tokens: the most tokens that may wait.
        batch_tokens: the most padded tokens of a batch; None: what suits the device.
        timeout: the most seconds from a request's first byte to its answer.
        origins: web pages of these origins may send requests.
        prefix: the path under which a proxy shows the server, without a slash at its end; "": none.
    """

    keys: tuple[str, ...] | None
    aliases: Mapping[str, str] = field(default_factory=dict)
    default_model: str = "all-MiniLM-L6-v2"
    max_documents: int = 1000
    max_body: int = 32 << 20
    max_queue_tokens: int = 1 << 18
    batch_tokens: int | None = None
    timeout: float = 60.0
    origins: tuple[str, ...] = ()
    prefix: str = ""


class Service:
    """One server: its models, its limits and its state.

    Args:
        settings: of the server.
        roles: id → role, for every model that will be loaded; without aliases.

    Attributes:
        state: "loading", "ready" or "draining".
        in_flight: number of requests whose clients do not have their answers yet.
        body_bytes: bytes that these requests hold.
        cut: number of requests that a forced stop left without an answer.
        fleet, scheduler: None until the models are loaded.
    """

    def __init__(self, settings: ServerSettings, roles: Mapping[str, str]):
        self.settings, self.metrics = settings, Metrics()
        self.roles = dict(roles) | {alias: roles[target] for alias, target in settings.aliases.items()}
        self.state = "loading"
        self.in_flight = self.body_bytes = self.cut = 0
        self.fleet: Fleet | None = None
        self.scheduler: Scheduler | None = None
        self._digests = None if settings.keys is None else [_digest(key) for key in settings.keys]

    def run(self, load: Callable[[], Fleet], opened: Callable[[], None]) -> None:
        """Loads and warms the models, then serves until `close`. All of it runs on the calling thread; see Scheduler.work for the reason.

        Args:
            load: loads the models.
            opened: called once, when the server takes requests.
        """
        fleet = load()
        fleet.warm()
        self.fleet = fleet
        self.scheduler = Scheduler(self.settings.batch_tokens or token_budget(fleet.device), self.settings.max_queue_tokens, self.metrics)
        if self.state == "loading":
            self.state = "ready"
        opened()
        self.scheduler.work()

    def drain(self) -> None:
        """Refuses new work. Requests in flight are finished."""
        self.state = "draining"

    def close(self) -> None:
        """Ends `run`."""
        if self.scheduler is not None:
            self.scheduler.close()

    def authorize(self, header: str | None) -> None:
        """Checks an Authorization header in constant time.

        Raises:
            Refusal: 401, the key is missing or unknown.
        """
        if self._digests is None:
            return
        scheme, _, token = (header or "").partition(" ")
        given, known = _digest(token.strip()), False
        for digest in self._digests:
            known |= hmac.compare_digest(digest, given)
        if not known or scheme.lower() != "bearer":
            raise Refusal(401, "A known key is needed: Authorization: Bearer KEY.", {"WWW-Authenticate": "Bearer"})

    def check_ready(self) -> None:
        """Checks that the server takes work.

        Raises:
            Refusal: 503, it is loading or draining.
        """
        if self.state != "ready":
            raise Refusal(503, f"The server is {self.state}; try again later.", {"Retry-After": "2" if self.state == "loading" else "5"})

    def models(self) -> list[dict[str, Any]]:
        """Every id with its role, dimensions, token limit and score scale."""
        self.check_ready()
        assert self.fleet is not None
        found = []
        for name in self.roles:
            target = self.settings.aliases.get(name, name)
            encoder, cross = self.fleet.encoders.get(target), self.fleet.crosses.get(target)
            scale = LOGIT_SCALE if encoder is None else SCALES[encoder.similarity]
            about: dict[str, Any] = {"id": name, "role": self.roles[name], "score_scale": scale}
            if encoder is not None:
                about |= {"token_limit": encoder.limit, "dimensions": encoder.dimensions, "token_dimensions": encoder.token_dimensions}
            elif cross is not None:
                about |= {"token_limit": cross.limit, "dimensions": 1}
            found.append(about | ({"alias_of": target} if target != name else {}))
        return found

    def pools(self, name: str) -> bool:
        """Whether the model of an id makes vectors of whole texts, so that fast can compare them. True as long as models are loading."""
        encoder = None if self.fleet is None else self.fleet.encoders.get(self.settings.aliases.get(name, name))
        return encoder is None or encoder.pools

    def ids(self, role: str) -> list[str]:
        """The ids of this role, the default model first."""
        found = [name for name, own in self.roles.items() if own == role]
        return sorted(found, key=lambda name: name != self.settings.default_model)

    def reranker(self, call: Call) -> Reranker:
        """A Reranker with the models and the method of a call.

        Raises:
            Refusal: 404, an id is unknown; 422, a model has another role, or the method cannot run with it.
        """
        assert self.fleet is not None
        named = {"model": call.model, "model_cross": call.cross}
        for place, name in named.items():
            if name is not None and name not in self.roles:
                raise Refusal(404, f"{place}: no such model. Known ids: {', '.join(self.roles)}.")
        needs_model = "bi-encoder" in METHODS[call.method.name].roles
        for place, role, wanted in (("model", "bi-encoder", needs_model), ("model_cross", "cross-encoder", call.cross is not None)):
            own = self.roles[named[place] or call.model]
            if wanted and own != role:
                raise invalid([place], f"Input should be the id of a {role}, and this is a {own}; {role}s: {', '.join(self.ids(role))}", "wrong_role")
        if needs_model and (why := call.method.refusal(self.pools(call.model))):
            able = in_words([name for name, kind in METHODS.items() if kind().refusal(pools=False) is None], "or")
            message = f"Input should be {able} for this model: {why}, and it has a vector for each token alone (late interaction)"
            raise invalid(["method"], message, "wrong_method")
        model, cross = (None if name is None else self.settings.aliases.get(name, name) for name in named.values())
        return self.fleet.reranker(call.method, model if needs_model else None, cross, max_tokens_per_doc=call.max_tokens_per_doc)

    async def rank(self, call: Call) -> tuple[Ranking, Job]:
        """Ranks the documents of a call. Returns the ranking, and its job with the times that it took.

        Raises:
            Refusal: 404, 422, 429 or 503; 500 if a model fails, with the model's name.
        """
        self.check_ready()
        assert self.scheduler is not None
        reranker = self.reranker(call)
        characters = len(call.query) + sum(map(len, call.texts))
        # An estimate: four characters for a token, and no more tokens than the model reads. So a long document does not fill the queue.
        most = 4 * reranker.token_limit
        pairs = len(call.texts) if reranker.scorer is not None and reranker.scorer.needs is None else 1
        tokens = 1 + (min(len(call.query), most) * pairs + sum(min(len(text), most) for text in call.texts)) // 4
        try:
            ranking, job = await self.scheduler.run(lambda: Steps(reranker, call.query, call.texts), characters, tokens=tokens, batch_size=call.batch_size)
        except (Refusal, asyncio.CancelledError):
            raise
        except ModelError as error:
            raise Refusal(500, str(error)) from error
        except Exception as error:
            names = " and ".join(name for name in (call.model if reranker.encoder else None, call.cross) if name is not None)
            log.error("request %s: method %s failed with model %s: %s", REQUEST.get(), call.method.name, names, without_message(error))
            raise Refusal(500, f"method {call.method.name} failed with model {names}: {type(error).__name__}") from error
        if call.forbids_cut and (ranking.truncated or _query_cut(reranker, call.query)):
            message = f"Input holds a text longer than what is read of it here, {reranker.token_limit} tokens: shorten it, or allow that its end is cut off"
            raise invalid([call.forbids_cut], message, "too_long_to_read_whole")
        return ranking, job


def without_message(error: BaseException) -> str:
    """An error's type and traceback for a log, without its message, which may repeat what a client sent."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}"


def _query_cut(reranker: Reranker, query: str) -> bool:
    """Whether an encoder reads only a part of the query. If a cross-encoder reads pairs, the ranking itself tells."""
    needs = None if reranker.scorer is None else reranker.scorer.needs
    encoder = reranker.encoder if needs is None else needs.encoder
    if encoder is None:
        return False
    (tokens,) = encoder.tokenize([query], "query", encoder.limit)
    return tokens.full_length > len(tokens) - encoder.specials


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def check_aliases(pairs: Iterable[str], roles: Mapping[str, str]) -> dict[str, str]:
    """Parses the aliases of the command line, NAME=ID.

    Raises:
        ValueError: an alias is malformed, is given twice, has the name of an id, or names an unknown id.
    """
    aliases: dict[str, str] = {}
    for pair in pairs:
        name, equals, target = pair.partition("=")
        if not (name and equals and target):
            raise ValueError(f"--alias {pair!r}: write NAME=ID")
        if name in aliases or name in roles:
            raise ValueError(f"--alias {pair!r}: {name!r} is taken already")
        if target not in roles:
            raise ValueError(f"--alias {pair!r}: {target!r} is no known id ({', '.join(roles)}); name a model by --model or --model-cross first")
        aliases[name] = target
    return aliases
