"""python -m rerank_lab.eval: which reranking method is best on a collection, by how much, and at what cost."""

from __future__ import annotations

import logging
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from rerank_lab import cli
from rerank_lab.client.v3 import KEY
from rerank_lab.errors import ModelError, UserError
from rerank_lab.eval.settings import MEASURES, OVERRIDES, EvalSettings, parse

if TYPE_CHECKING:
    from rerank_lab.eval.executors.base import Executor

log = logging.getLogger("rerank_lab")


class _ProgressBarHandler(logging.Handler):
    """Writes log lines to stderr without breaking progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    handler = _ProgressBarHandler()
    handler.setFormatter(logging.Formatter("rerank_lab: %(message)s"))
    log.setLevel(logging.INFO if sys.stderr.isatty() else logging.WARNING)
    log.addHandler(handler)
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        settings = parse(words)
        print(_run(settings, words) if settings.list is None else _description(settings, settings.list) if settings.list else _listing())
        return 0
    except UserError as error:
        print(f"rerank_lab: error: {error}", file=sys.stderr)
        return 2
    except ModelError as error:
        print(f"rerank_lab: failed: {error}", file=sys.stderr)
        return 1
    except (MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _out_of_memory(error):
            raise
        print(f"rerank_lab: failed: {type(error).__name__}: {error}; the same command with --resume goes on from here", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrerank_lab: interrupted; the same command with --resume goes on from here", file=sys.stderr)
        return 130
    finally:
        log.removeHandler(handler)


def _out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU ran out of memory."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def _run(settings: EvalSettings, argv: Sequence[str]) -> str:
    """Runs one evaluation or a grid of them, here or on a cluster. Returns the text for stdout."""
    from rerank_lab.eval import grid
    from rerank_lab.eval.evaluate import checked, collection_hash, evaluate, model_pools, out_folder

    collection_hash.cache_clear()
    model_pools.cache_clear()
    if settings.grid is None:
        checked(settings)
    with _sigterm_as_interrupt(), closing(_executor(settings)) as executor, _sigterm_as_interrupt():  # Ray sets a handler of its own
        if settings.grid is None:
            return evaluate(settings, executor)
        return grid.run(settings, argv, out_folder(settings, settings.grid.stem), partial(evaluate, executor=executor), checked)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Treats SIGTERM like Ctrl-C: a job that a scheduler ends stops its work on other machines too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _executor(settings: EvalSettings) -> Executor:
    from rerank_lab.cache.store import Store
    from rerank_lab.eval.evaluate import cache_place
    from rerank_lab.eval.executors.local import LocalExecutor

    cache = cache_place(settings)
    if settings.executor == "local" or cache is None:
        return LocalExecutor(None if cache is None else Store(cache))
    from rerank_lab.eval.executors.ray import RayExecutor

    resources = settings.resources or {"CPU": 1.0}
    return RayExecutor(settings.address or "auto", cache, workers=settings.workers, resources=resources, kernels=settings.kernels, threads=settings.threads)


def _description(settings: EvalSettings, model: str) -> str:
    """How a model would be read with these prompts, dimensions and instruction, a line for each title."""
    from rerank_lab.eval.evaluate import cache_place
    from rerank_lab.methods import best
    from rerank_lab.models.base import Overrides
    from rerank_lab.models.kinds import described, origin

    width, asked = 17, Overrides(**{name: getattr(settings, name) for name in OVERRIDES})
    titles = dict(described(model, asked))
    if (own := origin(model, asked, settings.subspace)) is not None:
        titles["token spread"] = best.told(own, cache_place(settings), settings.precision)
    return "\n".join(
        textwrap.fill(f"{title:<{width - 1}} {text}", 80, subsequent_indent=" " * width, break_long_words=False, break_on_hyphens=False)
        for title, text in titles.items()
    )


def _listing() -> str:
    from rerank_lab.datasets.beir import bundled_names
    from rerank_lab.measures.quality import known_measures
    from rerank_lab.methods import METHODS, labels, shown
    from rerank_lab.models.registry import REGISTRY

    def wrapped(title: str, text: str) -> str:
        return textwrap.fill(text, 80, initial_indent=f"  {title:<18}", subsequent_indent=" " * 20)

    lines = ["models (or any folder or hub name of the right kind)"]
    lines += [wrapped(m.id, f"{m.role} from {m.source}, {m.token_limit} tokens, {m.dimensions} dimensions, {m.note}") for m in REGISTRY.values()]
    lines += ["methods and their settings"]
    for label, about in labels().items():
        if label in METHODS:
            settings = ", ".join(f"{k}={shown(v)}" for k, v in METHODS[label]().settings().items()) or "no settings"
            about += f"; needs a {' and a '.join(METHODS[label].roles)}; {settings}"
        lines += [wrapped(label, about)]
    crossed = ", ".join(label for label in labels() if label not in METHODS)
    lines += [wrapped("endpoint:URL[:M]", f"the method M (fast without, {crossed} too) as a server runs it that speaks v3; its key from ${KEY}")]
    lines += ["collections", wrapped("bundled", ", ".join(bundled_names())), wrapped("yours", "a BEIR folder or .zip, hf:NAME, irds:ID")]
    lines += ["measures", wrapped("default", ", ".join(MEASURES)), wrapped("known", ", ".join(known_measures()) + "; most with @k")]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(cli.run(main))
