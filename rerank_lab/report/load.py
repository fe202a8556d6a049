"""A results folder as a report reads it, or a clear word on what is missing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from rerank_lab.datasets import Dataset, load_dataset
from rerank_lab.errors import UserError
from rerank_lab.journal import RESULTS
from rerank_lab.results import SCHEMA
from rerank_lab.timing import PHASES

ANY, NUMBER = object(), (int, float)
LATENCY = {"p50": NUMBER, "p95": NUMBER}
CHANGE = {"delta_ndcg@10": NUMBER, "ci95": ANY}
# What a report reads of results.json: a name with ? may be null, {"*": …} stands for any names.
SHAPE: dict[str, Any] = {
    "environment": {"cpu": str, "cpus": ANY, "threads": ANY, "device": str, "kernels": str, "python": str, "commit": ANY, "packages": {}, "vector_cache": str},
    "config": {"measures": list, "baseline": str, "seed": int, "dataset": str, "split": str, "methods": list},
    "dataset": {"name": str, "split": str, "hash": str, "notes": list, "documents": int},
    "models": {},
    "candidates": {"source": str, "top_k": int, "hash": str, "oracle_ndcg@10": NUMBER, "measures": {"*": NUMBER}, "notes": list},
    "rows": [{
        "method": str, "queries": int, "measures": {"*": NUMBER}, "ci95": {}, "settings": {}, "cold_sample": {"queries": int}, "timed_queries": int,
        "vs?": {"delta": NUMBER, "ci95": ANY, "p_t": ANY, "p_randomization": NUMBER, "p_holm": NUMBER, "wins": int, "ties": int, "losses": int, "measure": str},
        "vs_definition?": {"*": CHANGE}, "latency_ms?": LATENCY, "cold_latency_ms?": LATENCY, "phases_ms?": {"*": NUMBER}, "cold_phases_ms?": {"*": NUMBER},
        "docs_per_s": ANY, "cold_docs_per_s": ANY, "peak_rss_mb": ANY, "cold_peak_rss_mb": ANY, "flops_per_query": ANY, "cold_flops_per_query": ANY,
        "coverage": NUMBER, "unjudged_share": NUMBER, "truncated_share": ANY, "tie_rate": NUMBER, "token_limit": ANY,
    }],
    "sweeps": [{
        "setting": str, "value": NUMBER, "method": str, "measures": {"*": NUMBER}, "recall": NUMBER, "oracle_ndcg@10": NUMBER, "truncated_share": NUMBER,
    }],
}  # fmt: skip
GRID = "grid.json"  # in the folder of a grid of evaluations
SAME = 1e-9  # means of measures over queries, summed in another order


@dataclass(frozen=True, eq=False)
class Loaded:
    """One evaluation.

    Attributes:
        folder: where it lies.
        name: as the report calls it, unlike the others'.
        stem: the same in names of files and links.
        result: results.json.
        per_query: per_query.csv, ids as text.
        scores: scores.parquet; None where it is gone.
    """

    folder: Path
    name: str
    stem: str
    result: dict[str, Any]
    per_query: pd.DataFrame
    scores: pd.DataFrame | None

    @property
    def rows(self) -> dict[str, dict[str, Any]]:
        """Label → row, as the evaluation had them."""
        return {row["method"]: row for row in self.result["rows"]}

    @property
    def primary(self) -> str:
        """The measure that is tested and plotted."""
        return str(self.result["config"]["measures"][0])

    @property
    def baseline(self) -> str:
        """What the others are tested against."""
        return str(self.result["config"]["baseline"])

    @property
    def seed(self) -> int:
        """Of resampling."""
        return int(self.result["config"]["seed"])

    def measure(self, label: str, name: str | None = None) -> pd.Series:
        """A method's value by query id, in the order of the judgements."""
        own = self.per_query[self.per_query["method"] == label]
        return own.set_index("query")[name or self.primary]


def load(folders: Sequence[Path]) -> list[Loaded]:
    """All of them, each under a name of its own.

    Raises:
        UserError: no folder, an interrupted run, a file missing, damaged, or of another version; which, and what to do.
    """
    if twice := [str(folder) for folder in folders if [*map(Path.resolve, folders)].count(folder.resolve()) > 1]:
        raise UserError(f"{twice[0]} is named twice")
    found = [_load(folder) for folder in folders]
    names = [_name(one) for one in found]
    for tell in (lambda one: one.folder.resolve().name, lambda one: str(one.folder)):  # apart by as little as that takes
        names = [name if names.count(name) == 1 else f"{_name(one)} ({tell(one)})" for one, name in zip(found, names)]
    stems = [anchor(name) for name in names]
    stems = [stem if stems.count(stem) == 1 else f"{stem}-{n}" for n, stem in enumerate(stems, 1)]
    return [replace(one, name=name, stem=stem) for one, name, stem in zip(found, names, stems)]


def anchor(title: str) -> str:
    """A title in names of files and links."""
    return re.sub(r"[^\w]+", "-", title.lower()).strip("-")


def newest(root: Path) -> Path:
    """The results folder that was finished last, or the grid that it is of.

    Raises:
        UserError: none is there.
    """
    cells = (path for path in root.glob(f"*/*/{RESULTS}") if is_grid(path.parent.parent))
    done = sorted([*root.glob(f"*/{RESULTS}"), *cells], key=lambda path: path.stat().st_mtime)
    if not done:
        raise UserError(f"no finished results in {root}: name a results folder, or make one: python -m rerank_lab.eval")
    folder = done[-1].parent
    return folder.parent if is_grid(folder.parent) else folder


def is_grid(folder: Path) -> bool:
    """Whether a folder holds the cells of a grid."""
    return (folder / GRID).is_file()


def method(label: str) -> str:
    """A row's method; in a grid its values stand behind it in brackets."""
    return label.partition(" (")[0]


def collection(one: Loaded, given: dict[str, str]) -> Dataset:
    """The collection that was ranked, from where the run had it or as --dataset says.

    Raises:
        UserError: not to be found there, or another than the one that was ranked.
    """
    config, name = one.result["config"], one.result["dataset"]["name"]
    place = given.get(name, config["dataset"])
    dataset = load_dataset(place, config["split"])
    if dataset.hash != one.result["dataset"]["hash"]:
        raise UserError(f"{place} holds another collection than the one that was ranked (hash {dataset.hash[:16]}, not {one.result['dataset']['hash'][:16]})")
    return dataset


def _name(one: Loaded) -> str:
    data = one.result["dataset"]
    return str(data["name"]) + ("" if data["split"] == "test" else f" {data['split']}")


def _load(folder: Path) -> Loaded:
    if not folder.is_dir():
        raise UserError(f"{folder}: {'a file, not a results folder' if folder.exists() else 'no such folder'}; python -m rerank_lab.eval makes one")
    if (folder / "partial").is_dir():
        raise UserError(f"{folder} holds an interrupted run ({_done(folder / 'partial')}): finish it by the same command with --resume")
    result = _result(folder / RESULTS)
    frame = _per_query(folder / "per_query.csv", result)
    scores = _scores(folder / "scores.parquet", result, frame)
    for name, digest in result.get("files", {}).items():
        if (folder / name).is_file() and hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise UserError(f"{folder / name} is not the one that {RESULTS} came with; copy it back, or run the evaluation again with --overwrite")
    return Loaded(folder, "", "", result, frame, scores)


def _done(partial: Path) -> str:
    counts = [f"{path.stem}: {path.read_bytes().count(bytes([10]))} queries" for path in sorted(partial.glob("*.jsonl"))]
    return ", ".join(counts[:5]) + (f" and {len(counts) - 5} more" if len(counts) > 5 else "") or "nothing ranked yet"


def _result(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path.parent} has no {path.name}: no results folder, or an evaluation that never ended; python -m rerank_lab.eval makes one")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read back ({error}); run the evaluation again with --overwrite") from None
    schema = result.get("schema") if isinstance(result, dict) else None
    if schema != SCHEMA or type(schema) is not int:
        newer = isinstance(schema, int) and schema > SCHEMA
        remedy = "a newer rerank_lab made it: upgrade" if newer else "run the evaluation again with --overwrite"
        raise UserError(f"{path}: schema {schema!r}, and this version reads schema {SCHEMA}; {remedy}")
    problem = next(misfits(result, SHAPE, ""), None) or next(_inconsistent(result), None)
    if problem:
        raise UserError(f"{path}: {problem}; run the evaluation again with --overwrite")
    return dict(result)


def misfits(value: Any, shape: Any, place: str) -> Iterator[str]:
    """What is missing, or of another kind."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            yield f"{place or 'it'} is no object"
            return
        for name, inner in shape.items():
            key = name.removesuffix("?")
            for own in value if key == "*" else [key]:
                if own not in value:
                    yield f"{place}{own} is missing"
                elif not (name.endswith("?") and value[own] is None):
                    yield from misfits(value[own], inner, f"{place}{own}" + ("." if isinstance(inner, dict) else ""))
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{place} is no list"
            return
        for n, one in enumerate(value):
            yield from misfits(one, shape[0], f"{place}[{n}].")
    elif shape is not ANY and (not isinstance(value, shape) or isinstance(value, bool)):
        yield f"{place.removesuffix('.')} is {json.dumps(value)[:40]}"


def _inconsistent(result: dict[str, Any]) -> Iterator[str]:
    """What parts of it say differently."""
    labels, config = [row["method"] for row in result["rows"]], result["config"]
    if not labels or labels != config["methods"] or config["baseline"] not in labels:
        yield f"its rows ({', '.join(labels)}) are not those of its configuration"
    for row in result["rows"]:
        if (row["vs"] is None) != (row["method"] == config["baseline"]) or not config["measures"] or {*config["measures"]} != {*row["measures"]}:
            yield f"the row of {row['method']} does not fit its configuration"
        if phases := [p for p in (row["phases_ms"], row["cold_phases_ms"]) if p is not None and {*p} != {*PHASES}]:
            yield f"the row of {row['method']} has the phases {', '.join(phases[0])}"
    if not any(key.startswith("recall@") for key in result["candidates"]):
        yield "candidates.recall@ is missing"


def _per_query(path: Path, result: dict[str, Any]) -> pd.DataFrame:
    names = result["config"]["measures"]
    try:
        frame = pd.read_csv(path, dtype={"query": str, "method": str}, keep_default_na=False, na_values=[""])
    except FileNotFoundError:
        raise UserError(f"{path} is missing: without it there are no differences by query; copy it back, or run the evaluation again") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read back ({error}); run the evaluation again with --overwrite") from None
    missing = [name for name in ("query", "method", "candidates", "latency_ms", *names) if name not in frame]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; run the evaluation again with --overwrite")
    texts = [name for name in ("latency_ms", *names) if not pd.api.types.is_numeric_dtype(frame[name])]
    if texts or frame.duplicated(["method", "query"]).any():
        raise UserError(f"{path} holds {f'no numbers in {texts[0]}' if texts else 'a query twice'}; run the evaluation again with --overwrite")
    base = next(row["measures"][names[0]] for row in result["rows"] if row["method"] == result["config"]["baseline"])
    for row in result["rows"]:
        own = frame[frame["method"] == row["method"]]
        if len(own) != row["queries"]:
            raise UserError(f"{path} has {len(own)} of {row['queries']} queries of {row['method']}; run the evaluation again with --overwrite")
        if not np.allclose([own[n].mean() for n in names], [row["measures"][n] for n in names], rtol=0, atol=SAME):
            raise UserError(f"{path} and {RESULTS} are of two runs: their means of {row['method']} differ; run the evaluation again with --overwrite")
        if row["vs"] and not np.isclose(row["vs"]["delta"], row["measures"][names[0]] - base, atol=SAME):
            raise UserError(f"{path.with_name(RESULTS)} does not agree with itself on {row['method']}; run the evaluation again with --overwrite")
    return frame


def _scores(path: Path, result: dict[str, Any], per_query: pd.DataFrame) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read back ({error}); remove it, and the report leaves out which documents moved") from None
    if not {"method", "query", "document", "rank", "grade", "first_stage"} <= {*frame.columns}:
        raise UserError(f"{path} lacks columns; remove it, and the report leaves out which documents moved")
    ranked = {(label, q) for label, q, n in zip(per_query["method"], per_query["query"], per_query["candidates"]) if n}
    if {*zip(frame["method"], frame["query"])} != ranked:
        raise UserError(f"{path} and {RESULTS} are of two runs; remove it, and the report leaves out which documents moved")
    return frame
