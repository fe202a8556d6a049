"""One evaluation, from its settings to its results folder: collection, first stage, rankings, costs, results."""

from __future__ import annotations

import datetime
import logging
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from rerank_kernels import use_backend
from rerank_lab.cache.places import default_place
from rerank_lab.cache.store import folder_of, is_url
from rerank_lab.client.endpoint import Endpoint, key_from
from rerank_lab.client.v3 import KEY
from rerank_lab.datasets.dataset import Dataset
from rerank_lab.datasets.load import load_dataset
from rerank_lab.engine import spread_in
from rerank_lab.errors import UserError
from rerank_lab.eval import kernel_check, rows, sweep
from rerank_lab.eval.executors.base import Executor
from rerank_lab.eval.journal import Journal
from rerank_lab.eval.records import RowRecords
from rerank_lab.eval.results import Config, Results
from rerank_lab.eval.settings import OVERRIDES, EvalSettings, effective
from rerank_lab.eval.summary import Evaluation, summarize
from rerank_lab.eval.system import System, names
from rerank_lab.eval.table import table
from rerank_lab.eval.work import RankingWork
from rerank_lab.files import Json, expanded, file_hash
from rerank_lab.first_stage import file_of, find, usages
from rerank_lab.first_stage.base import TopK
from rerank_lab.first_stage.candidates import Candidates, make_candidates
from rerank_lab.measures.quality import check_grades, parse_measures
from rerank_lab.methods import METHODS
from rerank_lab.models import kinds
from rerank_lab.models.base import Detail
from rerank_lab.reranker import EXACT, Reranker

log = logging.getLogger("rerank_lab")


def evaluate(options: EvalSettings, executor: Executor) -> str:
    """Runs one evaluation and writes its results folder.

    Args:
        options: the settings.
        executor: does the work, here or on a cluster.

    Returns:
        the table for stdout.

    Raises:
        UserError: wrong input. ModelError: a model failed.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    systems, baseline = checked(options)
    if options.methods is None:
        _tell_what_is_left_out(options)
    out = out_folder(options, stem(options.dataset))
    journal = Journal(out, resume=options.resume, overwrite=options.overwrite)
    config = effective(options) | {"methods": list(systems), "baseline": baseline}
    if journal.finished:
        found = journal.results(config)
        _check_same(found, options, systems, out)
        return table(found) + f"\n{out} was finished already; nothing done\n"
    with ExitStack() as connections:
        remote = {}
        for label, system in systems.items():
            if system.server is not None:
                remote[label] = connections.enter_context(closing(_endpoint(system.server, system, options)))
                remote[label].check()
        with use_backend(options.kernels):
            return _evaluate(options, systems, remote, journal, config, executor)


def _check_same(found: Results, options: EvalSettings, systems: Mapping[str, System], out: Path) -> None:
    """Checks that finished results still belong to the files that the options name, and to the methods as they are set today.

    Raises:
        UserError: the collection, the run file or a default of a method has changed since.
    """
    file = file_of(options.candidates)
    changed = [options.candidates] if file is not None and file_hash(file) != found.candidates.details.get("file_sha256") else []
    changed += [options.dataset] if collection_hash(options.dataset, options.split) != found.dataset.hash else []
    for row in found.rows:
        now = {} if row.system.remote else systems[row.label].method.settings()
        changed += [f"the default {name} of {row.label}" for name, value in now.items() if row.settings.get(name) != value]
    if changed:
        raise UserError(f"{out} was finished before {' and '.join(changed)} changed; --overwrite replaces its results, another --out keeps them")


@cache  # the finished cells of a grid share collections
def collection_hash(dataset: str, split: str) -> str:
    """The hash of a collection's texts, queries and judgements."""
    return load_dataset(dataset, split).hash


def checked(options: EvalSettings) -> tuple[dict[str, System], str]:
    """Checks methods, measures, sweeps and baseline.

    Returns:
        label → system, in the order of the rows, and the baseline's label.

    Raises:
        UserError: some of them are wrong; the message lists all problems.
    """
    systems, problems = _systems(options)
    try:
        parse_measures(options.measures)
    except UserError as error:
        problems.append(str(error))
    problems += _unread(options, list(systems.values()))
    pools = model_pools(options.model)
    problems += sweep.problems(options.sweep, [system for system in systems.values() if not system.remote], pools)
    if not pools and find(options.candidates)[0].pooled:
        problems.append(
            f"--candidates {options.candidates} searches by vectors of whole texts, and model {options.model!r} has one for each token alone (late interaction); "
            f"give another first stage: {usages(', ', pooled=False)}"
        )
    if problems:
        raise UserError("; ".join(problems))
    baseline = options.baseline or next(iter(systems))
    if baseline not in systems:
        raise UserError(f"--baseline {baseline!r} is not among the methods {', '.join(systems)}")
    return systems, baseline


def _evaluate(
    options: EvalSettings, systems: dict[str, System], remote: dict[str, Endpoint], journal: Journal, config: dict[str, Json], executor: Executor
) -> str:
    dataset = load_dataset(options.dataset, options.split, executor.corpus())
    if options.limit_queries:
        dataset = _limited(dataset, options.limit_queries)
    check_grades(options.measures, dataset)
    for note in dataset.notes:
        log.warning("%s: %s", dataset.name, note)
    local = [system for system in systems.values() if not system.remote]
    reranker = _reranker(options, local)
    dataset.notes.extend(f"model {model.name}: {note}" for model in (reranker.encoder, reranker.cross) if model is not None for note in model.notes)
    log.info("%s (%s): %d documents, %d judged queries", dataset.name, dataset.split, len(dataset.corpus), len(dataset.qrels))
    try:
        about = executor.about(reranker)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--kernels {options.kernels}: {error}") from None
    own = {system.label: reranker.using(system.method, cross=system.crossed) for system in local}
    detail = max((row.detail for row in own.values()), default=None)
    detail = max((d for d in (detail, options.detail) if d is not None), default=None)
    rankers: dict[str, Reranker | Endpoint] = {**own, **remote}
    deep = _candidates(options, dataset, reranker, detail, executor)
    work = RankingWork(executor, dataset, deep.cut(options.top_k), journal)
    for note in work.candidates.notes:
        log.warning("%s", note)

    in_use = {system.label: numbers for system in local if (numbers := system.method.in_use(spread_in(about.models)))}
    settings = {label: system.recorded(options.max_tokens_per_doc) for label, system in systems.items() if system.method.settings()}
    depends = {"dataset": dataset.hash, "candidates": work.candidates.hash, "models": about.models}
    journal.begin(config | depends | {name: value for name, value in (("settings", settings), ("in_use", in_use)) if value})
    collected: dict[str, RowRecords] = {}
    for label in systems:
        ranker = rankers[label]
        collected[label] = RowRecords(work.records(label, ranker), ranker.token_limit, work.cold(label, ranker, options.cold_queries))
    if local and reranker.arithmetic != EXACT:
        # The same rankings in fp32, by the same numbers, show how much quality a faster runtime or precision costs.
        exact = _reranker(options, local, exact=True)
        _encode_candidates(exact, dataset, work.candidates, detail, "encode candidates in fp32", executor)
        for system in local:
            row = exact.using(replace(system.method, **in_use.get(system.label, {})), cross=system.crossed)
            collected[system.label].exact = work.records(f"{system.label} in fp32", row)
    for label, row in own.items() if not options.no_kernel_check else ():
        if "bi-encoder" in row.method.roles and row.cross is None:  # these kernels compute nothing of a cross-encoder's scores
            collected[label].kernels = kernel_check.check(label, row, about.dtypes, work.records)

    def encode(tokens: int) -> None:
        _encode_candidates(reranker.with_max_tokens(tokens), dataset, work.candidates, detail, f"encode {tokens} tokens", executor)

    done = {label: collected[label].records for label in own}
    points = list(sweep.run(options.sweep, local, own, done, work, deep, encode))
    who = Counter(record.by for row in collected.values() for record in row.records)
    if len(who) > 1:
        said = " and ".join(f"{name} ({times})" for name, times in who.items())
        dataset.notes.append(f"the run went on elsewhere: rankings were timed by {said}; compare their latencies with care")
        log.warning("%s", dataset.notes[-1])
    environment = replace(about.environment, timed_by=sorted(who))
    if executor.name == "local":
        environment = replace(environment, vector_cache=reranker.cache_state)
    evaluation = Evaluation(environment, Config.of(config), about.models, dataset, work.candidates, systems)
    results, files = summarize(evaluation, collected, points)
    journal.finish(files)
    return table(results) + f"\nWritten to {journal.out}\nAs a page with plots: python -m rerank_lab.report {shlex.quote(str(journal.out))}\n"


def _systems(options: EvalSettings) -> tuple[dict[str, System], list[str]]:
    """Label → system, and one problem for each wrong name or setting."""
    cross, pools = options.model_cross != "none", model_pools(options.model)
    systems: dict[str, System] = {}
    problems: list[str] = []
    able = [name for name in names(cross) if System(name, name).method.refusal(pools) is None]
    for label in able if options.methods is None else options.methods:
        try:
            system = System.parse(label, options.top_k)
            if system.method:
                systems[label] = system
            if system.crossed and not cross:
                raise UserError(f"method {label!r} needs a cross-encoder, and --model-cross is none")
            if not system.remote and (why := system.method.refusal(pools)):
                raise UserError(f"method {label!r}: {why}, and model {options.model!r} has none (late interaction); it has maxsim and best")
            if system.remote and options.fuse_first_stage:
                raise UserError(f"method {label!r}: a server does not know the first stage's scores; leave out --fuse-first-stage or this row")
        except UserError as error:
            problems.append(str(error))
    return systems, problems


def _unread(options: EvalSettings, systems: Sequence[System]) -> Iterator[str]:
    """A problem for each prompt, instruction and number of dimensions that no row's model here would read."""
    local = [system for system in systems if not system.remote]
    encodes = find(options.candidates)[0].pooled or any("bi-encoder" in system.method.roles for system in local)
    for name in OVERRIDES:
        read = any(system.crossed for system in local) if name == "instruction" else encodes
        if systems and getattr(options, name) is not None and not read:
            raw = f"--{name.replace('_', '-')}"
            yield f"{raw}: no model here reads it; start the server with it" if len(local) < len(systems) else f"{raw}: no row runs a model that reads it"


def _tell_what_is_left_out(options: EvalSettings) -> None:
    """Says which methods do not run by default, and why."""
    crossed = [name for name in METHODS if System(name, name).crossed] if options.model_cross == "none" else []
    if crossed:
        print(f"{', '.join(crossed)} left out: they need a cross-encoder, and --model-cross is none", file=sys.stderr)
    for name, kind in METHODS.items():
        if name not in crossed and (why := kind().refusal(model_pools(options.model))):
            print(f"{name} left out: {why}, and model {options.model!r} has none (late interaction)", file=sys.stderr)


@cache  # the cells of a grid share models
def model_pools(name: str) -> bool:
    """Whether the model of a name makes vectors of whole texts. True if that cannot be told; loading it then says why."""
    try:
        return kinds.pools(name)
    except UserError:
        return True


def stem(dataset: str) -> str:
    """A collection's name as part of a folder's name."""
    scheme, _, rest = dataset.partition(":")
    place = Path(rest if scheme in ("hf", "irds") else dataset)
    return re.sub(r"[^\w.-]", "_", (place.resolve() if place.exists() else place).name.removesuffix(".zip"))


def out_folder(options: EvalSettings, stem: str) -> Path:
    """The results folder: --out; with --resume the latest one for `stem`; otherwise a new one named after the day and `stem`."""
    if options.out is not None:
        return Path(options.out)
    wanted = Path("results") / f"{datetime.date.today():%Y-%m-%d}-{stem}"
    if options.resume:
        ours = [p for p in Path("results").glob("*") if re.fullmatch(rf"\d{{4}}-\d\d-\d\d-{re.escape(stem)}(-\d+)?", p.name)]
        return max(ours, key=lambda p: ((p / "partial").is_dir(), p.stat().st_mtime), default=wanted)
    names = [wanted, *(wanted.with_name(f"{wanted.name}-{n}") for n in range(2, 10_000))]
    return next(path for path in names if options.overwrite or not path.exists())


def _endpoint(url: str, system: System, options: EvalSettings) -> Endpoint:
    return Endpoint(
        url,
        system.method,
        model=options.model,
        model_cross=options.model_cross if system.crossed else None,
        max_tokens_per_doc=options.max_tokens_per_doc,
        key=key_from(KEY),
    )


def _reranker(options: EvalSettings, systems: Sequence[System], *, exact: bool = False) -> Reranker:
    """Loads the models that these systems need; exact: by torch in fp32 instead of the runtime and precision in the options.

    Its method is one that needs the spread of the model's token similarities, if a row or a sweep does: results then name it. If exact, it is
    maxsim, which needs none: rows in fp32 take the numbers that the rows have found.
    """
    needs_cross = any(system.crossed for system in systems)
    elsewhere = options.executor == "ray"  # the models here then only describe those on the workers; this machine may lack the workers' device
    made = Reranker(
        options.model,
        "maxsim",
        options.model_cross if needs_cross else None,
        max_tokens_per_doc=options.max_tokens_per_doc,
        fuse_first_stage=options.fuse_first_stage,
        cache_dir=None if elsewhere else cache_place(options),
        cache_bytes=int(options.cache_gb * 1e9),
        subspace=options.subspace,
        device="cpu" if elsewhere else options.device,
        runtime="torch" if exact else options.runtime,
        precision="fp32" if exact else options.precision,
        **{name: getattr(options, name) for name in OVERRIDES},
    )
    made = made.elsewhere(device=options.device) if elsewhere else made
    return made if exact else made.using(max(sweep.methods(options.sweep, systems), key=lambda method: method.needs_spread(), default="maxsim"))


def cache_place(options: EvalSettings) -> str | None:
    """Where vectors are kept: a URL, or an absolute folder, since workers run in other folders. None: nowhere."""
    if options.no_cache:
        return None
    place = expanded(options.cache or default_place())
    return place if is_url(place) else str(folder_of(place).absolute())


def _candidates(options: EvalSettings, dataset: Dataset, reranker: Reranker, detail: Detail | None, executor: Executor) -> Candidates:
    """Runs the first stage and caches the vectors of all documents that the methods will read (detail None: the methods need no vectors)."""
    # One forward pass gives every kind of vector, so the whole corpus is encoded at once, unless the methods read only few documents.
    whole = detail and len(dataset.qrels) * options.top_k >= len(dataset.corpus)

    def search(ids: Sequence[str], queries: Sequence[str], fetch: int) -> list[TopK]:
        if whole and detail:
            executor.encode(reranker, dataset.corpus, ids, detail, "encode corpus")
        return executor.search(reranker, dataset.corpus, ids, queries, fetch)

    found = make_candidates(
        options.candidates,
        dataset,
        sweep.deepest(options.sweep, options.top_k),
        search=search,
        drop_identical=options.drop_identical_ids,
        progress=rows.bar,
        device="auto" if options.executor == "ray" else options.device,
    )
    _encode_candidates(reranker, dataset, found, detail, "encode candidates", executor)
    return found


def _encode_candidates(reranker: Reranker, dataset: Dataset, candidates: Candidates, detail: Detail | None, title: str, executor: Executor) -> None:
    """Puts the vectors of all candidates into the cache (detail None: the methods need no vectors)."""
    if detail is not None:
        needed = list({d: None for ranked in candidates.run.values() for d in ranked.documents})
        executor.encode(reranker, dataset.corpus, needed, detail, title)


def _limited(dataset: Dataset, count: int) -> Dataset:
    kept = list(dataset.qrels)[:count]
    queries = {q: dataset.queries[q] for q in kept if q in dataset.queries}
    return replace(
        dataset, queries=queries, qrels={q: dataset.qrels[q] for q in kept},
        notes=[*dataset.notes, *([f"only the first {count} of {len(dataset.qrels)} judged queries (--limit-queries)"] if count < len(dataset.qrels) else [])],
        facts=dataset.facts | {"queries": len(queries), "judged_queries_without_text": len(kept) - len(queries), "judgements": sum(len(dataset.qrels[q]) for q in kept)},
    )  # fmt: skip
