"""What stands behind the routes: models by their ids, who may ask, what state the server is in, and one way to rank."""

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
from rerank_lab.server.contract import Call, Refusal, invalid
from rerank_lab.server.fleet import Fleet
from rerank_lab.server.metrics import Metrics
from rerank_lab.server.scheduler import Job, Scheduler
from rerank_lab.server.steps import Steps

log = logging.getLogger(__name__)
REQUEST: ContextVar[str] = ContextVar("request_id", default="-")
SCALES = {"bi-encoder": "cosine, -1 to 1", "cross-encoder": "sigmoid of the logit, 0 to 1"}


@dataclass(frozen=True)
class Settings:
    """How a server is set up.

    Attributes:
        keys: that open it; None: no key is asked for.
        aliases: another name → the id that it stands for.
        default_model: what the routes for other clients run where none is named.
        max_documents: of a request.
        max_body: bytes of one body; bodies that are in memory at once may take four times as much.
        max_queue_tokens: that may wait.
        batch_tokens: padded tokens of a batch; None: what suits the device.
        timeout: seconds from a request's first byte to its answer.
        origins: of web pages that may ask.
        prefix: of paths, as a proxy in front has it; without a slash at its end.
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
    """One server's models and limits.

    Args:
        settings: its set-up.
        roles: id → role of every model that will be loaded, aliases left out.
    """

    def __init__(self, settings: Settings, roles: Mapping[str, str]):
        self.settings, self.metrics = settings, Metrics()
        self.roles = dict(roles) | {alias: roles[target] for alias, target in settings.aliases.items()}
        self.state = "loading"
        # Requests whose answers are not with their clients yet, what they hold in bytes, and how many a forced stop has cut.
        self.in_flight = self.body_bytes = self.cut = 0
        self.fleet: Fleet | None = None
        self.scheduler: Scheduler | None = None
        self._digests = None if settings.keys is None else [_digest(key) for key in settings.keys]

    def run(self, load: Callable[[], Fleet], opened: Callable[[], None]) -> None:
        """Loads the models, warms them, opens the doors and serves until `close`, all on the calling thread (Scheduler.work says why).

        Args:
            load: makes the models.
            opened: called once when requests are taken.
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
        """Takes no more work; what is in flight is finished."""
        self.state = "draining"

    def close(self) -> None:
        """Ends `run`."""
        if self.scheduler is not None:
            self.scheduler.close()

    def authorize(self, header: str | None) -> None:
        """Checks an Authorization header in constant time.

        Raises:
            Refusal: 401.
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
        """Refuses work while there are no models, or no more.

        Raises:
            Refusal: 503.
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
            about: dict[str, Any] = {"id": name, "role": self.roles[name], "score_scale": SCALES[self.roles[name]]}
            if encoder is not None:
                about |= {"token_limit": encoder.limit, "dimensions": encoder.dimensions, "token_dimensions": encoder.token_dimensions}
            elif cross is not None:
                about |= {"token_limit": cross.limit, "dimensions": 1}
            found.append(about | ({"alias_of": target} if target != name else {}))
        return found

    def ids(self, role: str) -> list[str]:
        """Ids with this role, the default model's first."""
        found = [name for name, own in self.roles.items() if own == role]
        return sorted(found, key=lambda name: name != self.settings.default_model)

    def reranker(self, call: Call) -> Reranker:
        """The models that a call names, under its method.

        Raises:
            Refusal: 404, an unknown id; 422, one of another role.
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
        model, cross = (None if name is None else self.settings.aliases.get(name, name) for name in named.values())
        return self.fleet.reranker(call.method, model if needs_model else None, cross, max_tokens_per_doc=call.max_tokens_per_doc)

    async def rank(self, call: Call) -> tuple[Ranking, Job]:
        """Ranks what a call holds.

        Raises:
            Refusal: 404, 422, 429, 503; 500 where a model fails, named.
        """
        self.check_ready()
        assert self.scheduler is not None
        reranker = self.reranker(call)
        characters = len(call.query) + sum(map(len, call.texts))
        # Four characters a token, and no more tokens than the model reads, so that a long document does not fill the queue.
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
        if call.whole and (ranking.truncated or _query_cut(reranker, call.query)):
            message = f"Input holds a text longer than what is read of it here, {reranker.token_limit} tokens: shorten it, or allow that its end is cut off"
            raise invalid([call.whole], message, "too_long_to_read_whole")
        return ranking, job


def without_message(error: BaseException) -> str:
    """Where an error came from and its type, for a log; its message may hold what a client sent."""
    return f"{type(error).__name__}\n{''.join(traceback.format_tb(error.__traceback__))}"


def _query_cut(reranker: Reranker, query: str) -> bool:
    """Whether an encoder reads only a part of the query; of pairs, rankings tell it themselves."""
    needs = None if reranker.scorer is None else reranker.scorer.needs
    encoder = reranker.encoder if needs is None else needs.encoder
    return encoder is not None and encoder.tokenize([query], "query", encoder.limit)[0].full_length > encoder.limit


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def check_aliases(pairs: Iterable[str], roles: Mapping[str, str]) -> dict[str, str]:
    """Aliases as they stand on the command line, NAME=ID.

    Raises:
        ValueError: one that is malformed, stands twice, hides an id or stands for none.
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
