"""What an evaluation is asked to do: its settings, and the two ways to write them, a command line and a TOML file. Imports no torch."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rerank_lab.cli import SUBSPACE, ComputeOptions, add_compute_options, count, natural, non_negative, path_of, place_of, positive, text
from rerank_lab.errors import UserError
from rerank_lab.first_stage import FIRST_STAGES, usages

if TYPE_CHECKING:
    from rerank_lab.models.base import Detail

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

EPILOG = """\
examples:
  python -m rerank_lab.eval
      all methods on the bundled numpydoc collection
  python -m rerank_lab.eval --dataset path/to/scifact --methods fast,best
      a BEIR folder; the second run finds the vectors in the cache
  python -m rerank_lab.eval --dataset hf:mteb/nfcorpus --candidates bm25 \\
      --model-cross cross-encoder/ms-marco-MiniLM-L6-v2
      over BM25's top 100, the cross-encoder from the hub
  python -m rerank_lab.eval --methods fast,best,best:tau=0.05:lexical=0.25
      one method twice, under other settings
  python -m rerank_lab.eval --sweep stage1_top_k=10,20,50,100,200 \\
      --sweep max_tokens_per_doc=64,128,256
      how deep the candidates must go, and how long the documents must be
  python -m rerank_lab.eval --methods fast,best,endpoint:http://host:8000:best
      a server that speaks v3, and how far it agrees with best here; its key
      from $RERANK_LAB_ENDPOINT_KEY

  python -m rerank_lab.eval --grid grid.toml --executor ray --address auto
      collections, models, settings at once, on the Ray cluster that is there;
      grid.toml: methods = ["fast", "best"]
                 [grid]
                 dataset = ["numpydoc", "path/to/scifact"]
                 precision = ["fp32", "bf16"]

exit codes: 0 done, 1 failed while running, 2 wrong input, 130 interrupted
(continue with --resume)
"""


COMMON_SETTINGS = ("max_tokens_per_doc", "top_k")  # settings that --sweep varies for every method, beside the method's own
OVERRIDES = ("query_prompt", "document_prompt", "truncate_dim", "instruction")  # what is asked of the models in place of what their folders say
CLUSTER_OPTIONS = ("executor", "address", "workers", "resources")  # where the work is done; results do not depend on it
MEASURES = ("nDCG@10", "RR@10", "AP@100", "R@100", "P@1", "Judged@10")
# Options that change no figure; results do not record them.
UNRECORDED = {"list", "config", "out", "resume", "overwrite", "cache", "cache_gb", "no_cache", "detail", "grid", *CLUSTER_OPTIONS}


@dataclass(frozen=True)
class EvalSettings(ComputeOptions):
    """The settings of one evaluation or of a grid. A field is the long name of an option; --help explains each (see `parser`).

    Attributes:
        list: a model's name: print how it is read; "": print what there is; None: evaluate.
        methods: labels of rows; None: all that can run.
        measures: names known to ir-measures; the first is tested and plotted.
        baseline: a label; None: the first method's.
        sweep: setting → its values, numbers first, ascending.
        out: the results folder; None: one in results/, named after the day and the collection.
        cache: a folder or a URL; None: the user's default cache.
        resources: a worker's share of a node; None: one CPU.
        detail: the least detail to encode of each document, because another cell of the grid needs it; None: what the methods need.
    """

    list: str | None = None
    dataset: str = "numpydoc"
    split: str = "test"
    candidates: str = "dense"
    top_k: int = 100
    drop_identical_ids: bool = False
    limit_queries: int | None = None
    methods: Sequence[str] | None = None
    model: str = "all-MiniLM-L6-v2"
    model_cross: str = "minilm-cross"
    subspace: str | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    truncate_dim: int | None = None
    instruction: str | None = None
    max_tokens_per_doc: int = 512
    fuse_first_stage: float = 0.0
    measures: Sequence[str] = field(default_factory=lambda: [*MEASURES])
    baseline: str | None = None
    sweep: Mapping[str, Sequence[float | str]] = field(default_factory=dict)
    no_kernel_check: bool = False
    cold_queries: int = 3
    seed: int = 0
    out: Path | None = None
    resume: bool = False
    overwrite: bool = False
    cache: str | None = None
    cache_gb: float = 16.0
    no_cache: bool = False
    grid: Path | None = None
    executor: str = "local"
    address: str | None = None
    workers: int | None = None
    resources: Mapping[str, float] | None = None
    config: Path | None = None
    detail: Detail | None = None


def parser() -> argparse.ArgumentParser:
    """The command line, with the defaults of all options."""
    p = argparse.ArgumentParser(
        prog="python -m rerank_lab.eval",
        description="Which reranking method is best on a collection, by how much, and at what cost.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--list",
        type=place_of,
        nargs="?",
        const="",
        metavar="MODEL",
        help="print models, methods with their settings, collections and measures, or how MODEL would be read, then exit",
    )
    data = p.add_argument_group("what to evaluate on")
    data.add_argument("--dataset", type=place_of, metavar="NAME", help="bundled name, BEIR folder or .zip, hf:NAME, irds:ID (default: numpydoc)")
    data.add_argument("--split", help="which judgements (default: test)")
    data.add_argument(
        "--candidates",
        type=place_of,
        metavar=usages("|"),
        help=f"the first stage: {'; '.join(f'{stage.usage}, {stage.help}' for stage in FIRST_STAGES.values())} (default: dense)",
    )
    data.add_argument("--top-k", type=count, metavar="N", help="candidates a query (default: 100)")
    data.add_argument(
        "--drop-identical-ids", action="store_true", help="drop the candidate whose id is the query's; only for collections whose queries are documents"
    )
    data.add_argument("--limit-queries", type=count, metavar="N", help="the first N judged queries only")
    what = p.add_argument_group("methods and models")
    what.add_argument(
        "--methods",
        type=_names,
        metavar="LIST",
        help="comma-separated, settings by colon: fast,best:tau=0.05; endpoint:URL[:METHOD] asks a v3 server (default: all that can run)",
    )
    what.add_argument("--model", type=place_of, help="bi-encoder: id, folder or hub name (default: all-MiniLM-L6-v2)")
    what.add_argument(
        "--model-cross",
        type=place_of,
        metavar="MODEL",
        help="cross-encoder for standard, optimal and best+cross: id, folder, hub name, .safetensors of a one-way adapter, or none (default: minilm-cross)",
    )
    what.add_argument("--subspace", type=place_of, metavar="FILE", help=SUBSPACE)
    what.add_argument(
        "--query-prompt", type=text, metavar="TEXT", help="put before the bi-encoder's queries, such as 'query: '; '' for none (default: the model's own)"
    )
    what.add_argument(
        "--document-prompt", type=text, metavar="TEXT", help="put before the bi-encoder's documents, such as 'passage: ' (default: the model's own)"
    )
    what.add_argument("--truncate-dim", type=count, metavar="N", help="keep the first N components of pooled vectors (Matryoshka; default: the model's own)")
    what.add_argument(
        "--instruction", type=text, metavar="TEXT", help="the task, for a cross-encoder whose prompt has a place for one (default: the model's own)"
    )
    what.add_argument(
        "--max-tokens-per-doc",
        type=count,
        metavar="N",
        help="own tokens kept of a document, a bi-encoder's document prompt counted among them; the model's limit applies too (default: 512)",
    )
    what.add_argument(
        "--fuse-first-stage",
        type=non_negative,
        nargs="?",
        const=1.0,
        metavar="WEIGHT",
        help="add WEIGHT (1 where left out) x z(first-stage score) to every method",
    )
    measure = p.add_argument_group("measures")
    measure.add_argument(
        "--measures",
        type=_names,
        metavar="LIST",
        help=f"any of ir-measures; the first is tested and plotted (default: {','.join(MEASURES)})",
    )
    measure.add_argument("--baseline", metavar="METHOD", help="what the others are tested against (default: the first method)")
    measure.add_argument(
        "--sweep",
        type=_sweep,
        action="append",
        metavar="NAME=V,V…",
        help="every method that has the setting NAME under these values too (stage1_top_k, tau …), or all under max_tokens_per_doc or top_k; may be repeated",
    )
    measure.add_argument("--no-kernel-check", action="store_true", help="do not rank with the kernels' definition and in other types of number beside them")
    measure.add_argument("--cold-queries", type=natural, metavar="N", help="queries timed with every document new, 0 for none (default: 3)")
    measure.add_argument("--seed", type=_seed, help="of resampling (default: 0)")
    out = p.add_argument_group("output")
    out.add_argument("--out", type=path_of, metavar="DIR", help="results folder (default: results/<date>-<dataset>)")
    out.add_argument("--resume", action="store_true", help="go on with an interrupted run of the same configuration")
    out.add_argument("--overwrite", action="store_true", help="replace the results in --out")
    machine = p.add_argument_group("machine")
    add_compute_options(machine)
    machine.add_argument(
        "--cache", type=place_of, metavar="DIR|URL", help="vector cache, a folder or a URL of fsspec's (default: $RERANK_LAB_CACHE or ~/.cache/rerank_lab)"
    )
    machine.add_argument("--cache-gb", type=non_negative, metavar="GB", help="what the cache may hold of one model; oldest go first (default: 16)")
    machine.add_argument("--no-cache", action="store_true", help="keep vectors in memory alone")
    p.add_argument(
        "--grid", type=path_of, metavar="FILE.toml", help="every combination of the lists in its table [grid], a results folder each; other keys as in --config"
    )
    where = p.add_argument_group("where it runs")
    where.add_argument("--executor", choices=("local", "ray"), help="this process, or a Ray cluster (extra ray; default: local)")
    where.add_argument(
        "--address", metavar="auto|local|HOST:PORT", help="with --executor ray: the cluster that is there, or one on this machine while it runs (default: auto)"
    )
    where.add_argument("--workers", type=count, metavar="N", help="with --executor ray: processes with the models (default: as many as there is room for)")
    where.add_argument(
        "--resources",
        type=_resources,
        metavar="NAME=N,…",
        help="with --executor ray: a worker's share of a node, CPU, GPU, memory (bytes), or yours (default: CPU=1)",
    )
    p.add_argument("--config", type=path_of, metavar="FILE.toml", help="options by their long names; flags win over it")
    p.set_defaults(**{name: value for name, value in vars(EvalSettings()).items() if name != "sweep"})  # argparse gathers the flags of --sweep in a list
    return p


def parse(argv: Sequence[str]) -> EvalSettings:
    """Reads the settings: flags win over the TOML file, and the file wins over defaults.

    Raises:
        UserError: the TOML file is unreadable or has unknown keys, or options contradict each other.
        SystemExit: wrong flags; argparse has printed the message.
    """
    p = parser()
    options = p.parse_args(argv)
    _check_once(options.sweep)
    first: list[str] = []
    for path in (options.config, options.grid):
        if path is not None:
            first += flags({key: value for key, value in read_toml(path).items() if path is options.config or key != "grid"}, path, p)
    options = p.parse_args([*first, *argv])
    if options.resume and options.overwrite:
        p.error("--resume goes on with a run, --overwrite throws it away: give one of them")
    given = [f"--{name}" for name in CLUSTER_OPTIONS[1:] if getattr(options, name) is not None]
    if options.executor == "local" and given:
        raise UserError(f"{', '.join(given)}: with --executor ray alone")
    if options.executor == "ray" and options.no_cache:
        raise UserError("--no-cache: workers share vectors through the cache; leave it out, or --executor ray")
    return EvalSettings(**vars(options) | {"sweep": dict(options.sweep or ())})


def effective(settings: EvalSettings) -> dict[str, Any]:
    """The configuration as results record it: every option that changes figures, as it was given.

    What is left to the models' folders is not there; `model_reading` in results has it. So runs that were begun before these
    options existed can go on.
    """
    recorded = {name: value for name, value in sorted(vars(settings).items()) if name not in UNRECORDED}
    return {name: value for name, value in recorded.items() if value is not None or name not in OVERRIDES}


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        UserError: the file is unreadable.
    """
    try:
        return dict(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def flags(table: dict[str, Any], path: Path, p: argparse.ArgumentParser) -> list[str]:
    """Turns the options in a TOML table into flags of the command line.

    Raises:
        UserError: a key is not an option, or a value has the wrong type.
    """
    actions = {a.dest: a for a in p._actions if a.option_strings and a.dest not in ("help", "config", "list", "grid")}
    unknown = [key for key in table if key.replace("-", "_") not in actions]
    if unknown:
        raise UserError(f"{path}: unknown keys {', '.join(unknown)}; valid: {', '.join(actions)}")
    if twice := [key for key in table if "-" in key and key.replace("-", "_") in table]:
        raise UserError(f"{path}: {twice[0]} stands there twice, with - and with _")
    words: list[str] = []
    for key, value in table.items():
        action = actions[key.replace("-", "_")]
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{path}: {key} must be true or false, not {value!r}")
            words += [action.option_strings[0]] if value else []
        elif key in ("sweep", "resources") and isinstance(value, dict):
            given = [f"{name}={_listed(values)}" for name, values in value.items()]
            words += [f"--{key}={','.join(given)}"] if key == "resources" else [f"--sweep={one}" for one in given]
        elif any(isinstance(one, bool) or not isinstance(one, (str, int, float)) for one in (value if isinstance(value, list) else [value])):
            raise UserError(f"{path}: {key} must be a number, a string or a list of such, not {value!r}")
        else:
            words += [f"{action.option_strings[0]}={_listed(value)}"]
    return words


def _listed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _resources(value: str) -> dict[str, float]:
    """Parses CPU=1,GPU=0.25,memory=8e9."""
    found: dict[str, float] = {}
    for part in value.split(","):
        name, equals, amount = part.partition("=")
        name = {"cpu": "CPU", "gpu": "GPU"}.get(name.strip().lower(), name.strip())
        if not equals or not name or name in found or name == "object_store_memory":
            raise argparse.ArgumentTypeError(f"{value!r} is no NAME=NUMBER,…, each name once: CPU, GPU, memory or a resource of yours")
        found[name] = positive(amount)
    return found


def _names(value: str) -> list[str]:
    names = [name.strip() for name in re.split(r",(?![^(]*\))", value) if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("needs at least one name")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise argparse.ArgumentTypeError(f"{', '.join(repeated)} stands there twice")
    return names


def _sweep(text: str) -> tuple[str, list[float | str]]:
    """Parses NAME=V,V,…; NAME is a setting of some method, max_tokens_per_doc or top_k."""
    from rerank_lab.methods import METHODS, Setting, settings_of  # which need torch

    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    declared = {key: own for kind in METHODS.values() for key, own in settings_of(kind).items()} | dict.fromkeys(COMMON_SETTINGS, Setting(int, 1))
    if not equals or name not in declared:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=VALUE,VALUE… with NAME one of {', '.join(sorted(declared))}")
    try:
        found = [declared[name].parse(value) for value in values.split(",") if value.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{name} takes {declared[name].takes}, not {values!r}") from None
    if len(set(found)) < max(len(found), 1):
        raise argparse.ArgumentTypeError(f"{name} needs one value or more, each once, not {values!r}")
    numbers = sorted(value for value in found if not isinstance(value, str))
    if declared[name].kind is int and min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{name} must be at least 1, not {min(numbers)}")
    return name, [*numbers, *(value for value in found if isinstance(value, str))]


def _check_once(sweeps: Sequence[tuple[str, list[float | str]]] | None) -> None:
    names = [name for name, _ in sweeps or ()]
    if len(set(names)) < len(names):
        raise UserError(f"--sweep {max(names, key=names.count)} stands there twice; give all its values at once")


def _seed(value: str) -> int:
    number = natural(value)
    if number >= 2**32:
        raise argparse.ArgumentTypeError(f"must be below 2^32, not {value}")
    return number
