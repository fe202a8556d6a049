"""python -m rerank_lab.eval: which reranking method is best on a collection, by how much, and at what cost."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial

import torch
from tqdm import tqdm

from rerank_lab import cli, grid
from rerank_lab.datasets import bundled_names
from rerank_lab.endpoint import KEY
from rerank_lab.errors import ModelError, UserError
from rerank_lab.evaluate import cache_place, checked, collection_hash, evaluate, out_folder
from rerank_lab.executor import Executor, Local
from rerank_lab.measures import DEFAULT, known_measures
from rerank_lab.methods import METHODS
from rerank_lab.models import REGISTRY
from rerank_lab.models.store import Store
from rerank_lab.options import parse
from rerank_lab.system import CROSSED

log = logging.getLogger("rerank_lab")


class _Beside(logging.Handler):
    """Lines on stderr that leave progress bars whole."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit code."""
    handler = _Beside()
    handler.setFormatter(logging.Formatter("rerank_lab: %(message)s"))
    log.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    log.addHandler(handler)
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        options = parse(words)
        print(_listing() if options.list else _run(options, words))
        return 0
    except UserError as error:
        print(f"rerank_lab: error: {error}", file=sys.stderr)
        return 2
    except ModelError as error:
        print(f"rerank_lab: failed: {error}", file=sys.stderr)
        return 1
    except (MemoryError, OSError, torch.OutOfMemoryError) as error:
        print(f"rerank_lab: failed: {type(error).__name__}: {error}; the same command with --resume goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrerank_lab: interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return 130
    finally:
        log.removeHandler(handler)


def _run(options: argparse.Namespace, argv: Sequence[str]) -> str:
    """One evaluation or a grid of them, here or on a cluster; what stdout shows of it."""
    collection_hash.cache_clear()
    if options.grid is None:
        checked(options)
    with _ended_as_interrupted(), closing(_executor(options)) as executor, _ended_as_interrupted():  # Ray sets a handler of its own
        if options.grid is None:
            return evaluate(options, executor)
        return grid.run(options, argv, out_folder(options, options.grid.stem), partial(evaluate, executor=executor), checked)


@contextmanager
def _ended_as_interrupted() -> Iterator[None]:
    """SIGTERM, by which schedulers end a job, is taken as Ctrl-C is: what runs elsewhere is ended too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _executor(options: argparse.Namespace) -> Executor:
    cache = cache_place(options)
    if options.executor == "local" or cache is None:
        return Local(None if cache is None else Store(cache))
    from rerank_lab.on_ray import OnRay

    resources = options.resources or {"CPU": 1.0}
    return OnRay(options.address or "auto", cache, workers=options.workers, resources=resources, kernels=options.kernels, threads=options.threads)


def _listing() -> str:
    def wrapped(title: str, text: str) -> str:
        return textwrap.fill(text, 80, initial_indent=f"  {title:<18}", subsequent_indent=" " * 20)

    lines = ["models (or any folder or hub name of the right kind)"]
    lines += [wrapped(m.id, f"{m.role} from {m.source}, {m.token_limit} tokens, {m.dimensions} dimensions, {m.note}") for m in REGISTRY.values()]
    lines += ["methods and their settings"]
    for name, kind in METHODS.items():
        settings = ", ".join(f"{k}={v:g}" for k, v in kind().settings().items()) or "no settings"
        lines += [wrapped(name, f"needs a {' and a '.join(kind.roles)}; {settings}")]
    joined = [name for name, kind in METHODS.items() if kind.optional_cross]
    lines += [wrapped(name + CROSSED, f"{name}, with the cross-encoder's logit in its sum") for name in joined]
    crossed = ", ".join(name + CROSSED for name in joined)
    lines += [wrapped("endpoint:URL[:M]", f"the method M (fast without, {crossed} too) as a server runs it that speaks v3; its key from ${KEY}")]
    lines += ["collections", wrapped("bundled", ", ".join(bundled_names())), wrapped("yours", "a BEIR folder or .zip, hf:NAME, irds:ID")]
    lines += ["measures", wrapped("default", ", ".join(DEFAULT)), wrapped("known", ", ".join(known_measures()) + "; most with @k")]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
