"""python experiments/collections/build_numpydoc.py --help

Builds `numpydoc`, a retrieval collection in BEIR's layout: API search over the docstrings of numpy and pandas. A See Also section
describes other objects in a human's words: the description is a query, the docstring of the object is the relevant document.

1. Names: all public ones of MODULES. Left out is what depends on more than the pinned versions: members of Python's own classes,
   numpy's sized numbers and dtype classes (these differ by platform), pandas' Styler (needs jinja2).
2. Documents: one for each distinct text, without See Also, References and Examples, of five words or more.
3. Groups: documents relevant together. Of one short name and sharing 80% of their words; of one short name in the classes of one
   of FAMILIES; an alias or stub ("Refer to `numpy.sum` for full documentation") and what it names.
4. Queries: descriptions without reST marks; those that differ only in case, punctuation, articles and final s are one. Kept: of
   four words or more, resolved, to three groups at most, not standing in a relevant document (compared as above), understood
   without their page (RELATIVE), and no template filled with four objects' names or more ("Aggregating std for Series").
5. Split: queries joined by a relevant document, or by near-copies (85% of the words, as DataFrame.add and DataFrame.mul), are a
   component. In the order of a seeded hash, components go whole to test while it has room, those of over ten queries to train.
6. Corpus: the relevant documents, and others in the order of the hash up to 1,200. README.md beside them says all counts.
Exit codes: 0; 1 for --check where the files differ; 2 for other versions of numpy and pandas, or wrong use.
"""

import argparse
import hashlib
import inspect
import json
import os
import pkgutil
import re
import sys
import types
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from itertools import accumulate, combinations
from pathlib import Path
from typing import NamedTuple

PINNED = {"numpy": "2.4.6", "pandas": "3.1.1"}
DEFAULT_OUT = Path(__file__).resolve().parents[2] / "rerank_lab" / "data" / "numpydoc"
CORPUS_SIZE, TEST_QUERIES, MIN_DOC_WORDS, MIN_QUERY_WORDS, MAX_GROUPS = 1200, 300, 5, 4, 3
SAME_NAME, NEAR_COPY, TEMPLATE_OBJECTS, STUB_WORDS, MAX_TEST_COMPONENT = 0.8, 0.85, 4, 40, 10

SUBMODULES = {
    "numpy": "char ctypeslib emath exceptions fft lib lib.array_utils lib.format lib.introspect lib.mixins lib.npyio lib.recfunctions"
    " lib.stride_tricks linalg ma ma.mrecords polynomial polynomial.chebyshev polynomial.hermite polynomial.hermite_e polynomial.laguerre"
    " polynomial.legendre polynomial.polynomial polynomial.polyutils random rec strings testing testing.overrides typing",
    "pandas": "api.executors api.extensions api.indexers api.interchange api.types api.typing arrays errors io.excel io.json io.parsers"
    " io.stata plotting testing tseries.api tseries.frequencies tseries.holiday tseries.offsets util",
}
MODULES = [path for root, names in SUBMODULES.items() for path in (root, *(f"{root}.{name}" for name in names.split()))]
OPEN_MODULES = ("pandas.util", "pandas.api.types")  # `__all__` is missing or incomplete
# Names are looked up in these, in this order, after the modules and classes around the docstring.
PREFIXES = ("numpy", "pandas", "pandas.api.typing", "pandas.arrays", "pandas.api.types", "pandas.tseries.offsets", "numpy.random")
# Classes whose members of the same name do the same thing. Such members are relevant together.
FAMILIES = {
    owner: family
    for family in (
        "pandas.DataFrame pandas.Series",
        "pandas.api.typing.DataFrameGroupBy pandas.api.typing.SeriesGroupBy",
        "pandas.DatetimeIndex pandas.arrays.DatetimeArray pandas.Series.dt",
        "pandas.PeriodIndex pandas.arrays.PeriodArray",
        "pandas.TimedeltaIndex pandas.arrays.TimedeltaArray",
        "pandas.IntervalIndex pandas.arrays.IntervalArray",
        "pandas.CategoricalIndex pandas.Categorical pandas.Series.cat",
        "pandas.Timestamp pandas.api.typing.NaTType",
        "numpy.random numpy.random.Generator numpy.random.RandomState",
        "numpy.strings numpy.char numpy.char.chararray",
        "numpy.ma numpy.ma.MaskedArray",
    )
    for owner in family.split()
}
NAME = r"(?::[\w:]+:)?`?~?[A-Za-z_](?:[\w.]*\w)?(?:\(\))?`?"
ENTRY = re.compile(rf"({NAME}(?:\s*,\s*{NAME})*)\s*,?\s*(?::(?:\s+(.*))?)?$")
STUB = re.compile(r"(?:\balias (?:for|of)|\bidentical to|^See) ([\w.]*\w)")
REFER = re.compile(r"\bRefer to ([\w.]*\w) for full documentation")
RELATIVE = re.compile(
    r"^(?:which|that|it|its|this|these)\b"
    r"|^(?:(?:an?|the) )?(?:(?:equivalent|similar|same|related|corresponding|analogous|another|alternative)\b(?! (?:to|of|as)\b)"
    r"|inverse (?:method|function|operation)\b)"
    r"|\b(?:this|the above) (?:function|method|class|attribute|property|operation)\b"
    r"|\b(?:counterpart|the equivalent)$",
    re.IGNORECASE,
)


class Named(NamedTuple):
    """A public name with its docstring. Names sort by rank: fewest dots first, then defined in the class itself, then the object's own name, then shortest."""

    rank: tuple[int, bool, bool, int]
    name: str
    doc: str


@dataclass
class Doc:
    """A document with all public names that have its docstring, best name first."""

    text: str
    named: list[Named] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.named[0].name


class Query(NamedTuple):
    id: str
    text: str
    relevant: list[str]


class Groups:
    """Union-find. The root of a group is its smallest member, so that the order of joins does not matter."""

    def __init__(self) -> None:
        self.parent: dict[str, str] = {}

    def find(self, item: str) -> str:
        while (up := self.parent.get(item, item)) != item:
            item = up
        return item

    def join(self, items: Iterable[str]) -> None:
        root, *others = sorted({self.find(item) for item in items})
        self.parent.update(dict.fromkeys(others, root))


def hashed(text: str) -> str:
    return hashlib.sha256(f"numpydoc 1 {text}".encode()).hexdigest()


def ours(module: object) -> bool:
    return isinstance(module, str) and module.split(".")[0] in PINNED


def documented(name: str, obj: object, own: bool) -> Iterator[Named]:
    doc = getattr(obj, "__doc__", None)
    if isinstance(doc, str) and doc.strip():
        home = f"{getattr(obj, '__module__', '')}.{getattr(obj, '__qualname__', '')}" == name
        length = len(name.replace("pandas.Index.", "pandas.DataFrame."))  # members that Index shares with Series get Series's name
        yield Named((name.count("."), not own, not home, length), name, inspect.cleandoc(doc))


def walk_class(name: str, cls: type, accessors: bool = True) -> Iterator[Named]:
    for key in sorted(k for k in dir(cls) if not k.startswith("_")):
        owner = next((c for c in cls.__mro__ if key in vars(c)), None)
        if owner is None or not ours(owner.__module__):  # built-in classes' docstrings change with Python
            continue
        raw = getattr(vars(owner)[key], "__func__", vars(owner)[key])  # unwraps staticmethod and classmethod
        if isinstance(accessor := getattr(raw, "_accessor", None), type):
            yield from documented(f"{name}.{key}", accessor, owner is cls)
            yield from walk_class(f"{name}.{key}", accessor, accessors=False) if accessors else ()
        elif callable(raw) or inspect.isdatadescriptor(raw) or inspect.ismethoddescriptor(raw):
            yield from documented(f"{name}.{key}", raw, owner is cls)


def walk() -> Iterator[Named]:
    import numpy as np

    # The types behind int_, longlong, longdouble, … and their docstrings depend on the platform.
    sized = {t for t in np.sctypeDict.values() if issubclass(t, np.number)}
    for path in MODULES:
        try:
            module = pkgutil.resolve_name(path)
        except (AttributeError, ImportError):  # not in every version
            continue
        yield from documented(path, module, True)
        public = getattr(module, "__all__", None)
        for key in sorted(dir(module) if path in OPEN_MODULES else public or dir(module)):
            obj = getattr(module, key, None)
            skip = (types.ModuleType, types.GenericAlias, np.ndarray, np.generic)
            if key.startswith("_") or isinstance(obj, skip) or (isinstance(obj, type) and obj in sized):
                continue
            home = getattr(obj, "__module__", None)
            if not (ours(home) or ours(type(obj).__module__)) or (not public and home != path and path not in OPEN_MODULES):
                continue
            yield from documented(f"{path}.{key}", obj, True)
            if isinstance(obj, type):
                yield from walk_class(f"{path}.{key}", obj)


def sections(doc: str) -> list[tuple[str, str]]:
    """(heading, body) pairs of a numpydoc docstring; the first has no heading."""
    lines = doc.split("\n")
    rule = re.compile(r"\s*(-{3,}|={3,})\s*")
    starts = [i for i in range(len(lines) - 1) if 0 < len(lines[i].strip()) < 40 and rule.fullmatch(lines[i + 1])]
    ends = [*starts, len(lines)]
    named = [(lines[a].strip().rstrip(":"), "\n".join(lines[a + 2 : b])) for a, b in zip(starts, ends[1:], strict=True)]
    return [("", "\n".join(lines[: ends[0]])), *named]


def document_text(doc: str) -> str:
    kept = [(h, body) for h, body in sections(doc) if h.lower() not in ("see also", "references", "examples", "example")]
    text = "\n\n".join((f"{h}\n{'-' * len(h)}\n" if h else "") + body.strip("\n") for h, body in kept)
    return "\n".join(re.sub(r"^\s+", "    ", line.rstrip()) for line in text.strip().split("\n"))  # indentation differs between Python versions


def plain(text: str) -> str:
    """A text as one line, without reST's roles, links, quotes and footnotes."""
    text = " ".join(text.split())
    text = re.sub(r"\s*<[^`<>]*>(?=`)|:[a-z:]+:(?=`)", "", text)
    return re.sub(r"`__?(?!\w)|`~?|\s*\[\d+\]_|\\(?=\s)|\*(?=\w+\*)|(?<=\w)\*(?=[\s-])", "", text)


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[%*+/<>=&|^@~]+", plain(text).lower())


def gist(text: str) -> str:
    """The words of a text in a normal form: texts that differ only in case, punctuation, articles and a final s have the same one."""
    return " ".join(re.sub(r"(?<=\w\w)s$", "", word) for word in words(text) if word not in ("a", "an", "the"))


def see_also(doc: str) -> Iterator[tuple[list[str], str]]:
    """(names, description) of every described entry of a docstring's See Also section."""
    for body in (body for heading, body in sections(doc) if heading.lower() == "see also"):
        entries: list[tuple[str, list[str]]] = []
        for line in inspect.cleandoc(body).split("\n"):
            if entry := ENTRY.match(line):
                entries.append((entry[1], [entry[2] or ""]))
            elif line.startswith((":", "..")) or not line.strip():
                entries.append(("", []))
            elif entries:  # not only indented lines: some entries continue in the first column
                entries[-1][1].append(line)
        for head, parts in entries:
            names = re.findall(r"[A-Za-z_](?:[\w.]*\w)?", re.sub(r":[\w:]+:`", "`", head))
            text = re.sub(r",? see [^.]* for more (?:details|information)\.?$", "", plain(" ".join(parts)).strip(), flags=re.IGNORECASE)
            if names and text:
                yield names, text.rstrip(" .")


def near(ids: Iterable[str], vocabulary: dict[str, frozenset[str]], share: float) -> Iterator[tuple[str, str]]:
    """Pairs of ids whose texts share at least `share` of their distinct words."""
    for a, b in combinations(((i, vocabulary[i]) for i in ids), 2):
        if share * max(len(a[1]), len(b[1])) <= min(len(a[1]), len(b[1])) and len(a[1] & b[1]) >= share * len(a[1] | b[1]):
            yield a[0], b[0]


class Resolver:
    """Finds the document that a name in a docstring refers to."""

    def __init__(self, docs: Iterable[Doc]) -> None:
        self.ids = {named.name: doc.id for doc in docs for named in doc.named}

    def __call__(self, name: str, source: str) -> str | None:
        name = re.sub(r"^np\.", "numpy.", re.sub(r"^pd\.", "pandas.", name))
        name = re.sub(r"^(?:pandas\.)?core\.(?:[a-z]+\.)*(?=[A-Z])", "", name)
        around = reversed(list(accumulate(source.split(".")[:-1], "{}.{}".format)))
        wanted = [name] + [f"{prefix}.{name}" for prefix in (*around, *PREFIXES)]
        if "GroupBy" in name:
            wanted += [w.replace(".GroupBy", ".DataFrameGroupBy") for w in wanted]
        return next((self.ids[w] for w in wanted if w in self.ids), None)


def make_docs(named: Iterable[Named]) -> list[Doc]:
    """One document for every distinct text, with its names, best first."""
    by_text: dict[str, Doc] = {}
    for one in sorted(named):
        text = document_text(one.doc)
        if len(words(text)) >= MIN_DOC_WORDS:
            by_text.setdefault(" ".join(text.split()), Doc(text)).named.append(one)
    return sorted(by_text.values(), key=lambda d: d.id)


def make_groups(docs: list[Doc], resolve: Resolver, vocabulary: dict[str, frozenset[str]]) -> Groups:
    groups = Groups()
    same: dict[str, list[str]] = defaultdict(list)
    family: dict[tuple[str, str], list[str]] = defaultdict(list)
    for doc in docs:
        same[doc.id.rpartition(".")[2].lower()].append(doc.id)
        for named in doc.named:
            owner, _, short = named.name.rpartition(".")
            family[FAMILIES.get(owner, owner), short].append(doc.id)
        line = plain(doc.text)
        pointer = REFER.search(line) or (STUB.search(line) if len(words(line)) <= STUB_WORDS else None)
        target = resolve(pointer[1], doc.id) if pointer else None
        groups.join([doc.id, target or doc.id])
    pairs = (pair for ids in same.values() for pair in near(ids, vocabulary, SAME_NAME))
    for together in (*family.values(), *pairs):
        groups.join(together)
    return groups


def make_queries(docs: list[Doc], resolve: Resolver, groups: Groups, counts: Counter[str]) -> list[Query]:
    members: dict[str, list[str]] = defaultdict(list)
    for doc in docs:
        members[groups.find(doc.id)].append(doc.id)
    gists = {doc.id: f" {gist(f'{doc.id} {doc.text}')} " for doc in docs}
    spellings, targets, filled = (defaultdict[str, set[str]](set) for _ in range(3))
    for doc in docs:
        for names, text in see_also(doc.named[0].doc):
            key, short = gist(text), {name.rpartition(".")[2].lower() for name in names}
            spellings[key].add(text)
            targets[key] |= {groups.find(target) for name in names if (target := resolve(name, doc.id))}
            filled[" ".join("_" if word in short else word for word in words(text))].add(key)
    templated = {key for keys in filled.values() if len(keys) >= TEMPLATE_OBJECTS for key in keys}
    queries = []
    for key, roots in sorted(targets.items()):
        text = min(spellings[key])
        relevant = sorted(member for root in roots for member in members[root])
        steps = {
            "distinct descriptions": True,
            "of four words or more": len(text.split()) >= MIN_QUERY_WORDS,
            "resolved": bool(relevant),
            "to three groups at most": len(roots) <= MAX_GROUPS,
            "not standing in a relevant document": not any(f" {key} " in gists[member] for member in relevant),
            "understood without their page": not RELATIVE.search(text),
            "of no template: queries": key not in templated,
        }
        for step, passed in steps.items():
            if not passed:
                break
            counts[step] += 1
        else:
            queries.append(Query("q" + hashed(key)[:8], text, relevant))
    return queries


def split(queries: list[Query], vocabulary: dict[str, frozenset[str]]) -> tuple[list[Query], list[Query]]:
    """(train, test). Queries that share a relevant document, or whose relevant documents are near-copies, form a component and stay together."""
    linked = Groups()
    relevant = {doc for query in queries for doc in query.relevant}
    for together in (*(query.relevant for query in queries), *near(relevant, vocabulary, NEAR_COPY)):
        linked.join(together)
    components: dict[str, list[Query]] = defaultdict(list)
    for query in queries:
        components[linked.find(query.relevant[0])].append(query)
    train, test = list[Query](), list[Query]()
    for _, part in sorted(components.items(), key=lambda item: hashed(item[0])):
        fits = len(part) <= MAX_TEST_COMPONENT and len(test) + len(part) <= TEST_QUERIES
        (test if fits else train).extend(part)
    return train, test


def licence(package: str, main: str, others: tuple[str, ...] = ()) -> str:
    """A distribution's licence without the appendix on bundled libraries, followed by the licences of parts that have their own."""
    files = {name: min((f for f in metadata.files(package) or [] if f.match(name)), key=str) for name in (main, *others)}
    texts = {name: Path(str(f.locate())).read_text("utf-8").split("\n----\n")[0].strip() for name, f in files.items()}
    return "\n\n".join([texts.pop(main), *(f"-------- {name} --------\n\n{text}" for name, text in texts.items())]) + "\n"


def build() -> tuple[dict[str, str], Counter[str]]:
    """Builds the collection. Returns path → text of every file, and the counts."""
    named = list(walk())
    docs = make_docs(named)
    counts: Counter[str] = Counter({"distinct docstrings": len({n.doc for n in named}), "documents": len(docs)})
    vocabulary = {doc.id: frozenset(re.findall(r"\w+", plain(doc.text).lower())) for doc in docs}
    resolve = Resolver(docs)
    groups = make_groups(docs, resolve, vocabulary)
    counts["groups of documents"] = len({groups.find(doc.id) for doc in docs})
    train, test = split(make_queries(docs, resolve, groups, counts), vocabulary)
    kept = {doc for query in (*train, *test) for doc in query.relevant}
    counts.update({"train queries": len(train), "test queries": len(test), "relevant documents": len(kept)})
    others = sorted((doc.id for doc in docs if doc.id not in kept), key=hashed)
    kept.update(others[: max(0, CORPUS_SIZE - len(kept))])
    corpus = [{"_id": doc.id, "title": doc.id, "text": doc.text} for doc in docs if doc.id in kept]
    queries = [{"_id": query.id, "text": query.text} for query in sorted([*train, *test])]
    files = {
        "corpus.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in corpus),
        "queries.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in queries),
        "LICENSE-numpy.txt": licence("numpy", "LICENSE.txt", ("numpy/ma/LICENSE", "numpy/random/LICENSE.md")),
        "LICENSE-pandas.txt": licence("pandas", "LICENSE"),
    }
    for name, part in (("train", train), ("test", test)):
        lines = sorted(f"{query.id}\t{doc}\t1\n" for query in part for doc in query.relevant)
        files[f"qrels/{name}.tsv"] = "query-id\tcorpus-id\tscore\n" + "".join(lines)
    return files, counts


def write(out: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (part := path.with_name(f".{path.name}.part")).write_text(text, "utf-8", newline="\n")
        os.replace(part, path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="folder to write (default: the package's own)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 and name the files in DIR that would change")
    parser.add_argument("--any-version", action="store_true", help="take the installed versions: makes another collection")
    args = parser.parse_args(argv)
    have = {package: next((d.version for d in metadata.distributions(name=package)), "none") for package in PINNED}
    if sys.flags.optimize > 1 or (have != PINNED and not args.any_version):
        print(f"error: made from {PINNED} without -OO, but found {have}; --any-version makes another collection", file=sys.stderr)
        return 2
    files, counts = build()
    if args.check:
        changed = [n for n, text in files.items() if not (args.out / n).is_file() or (args.out / n).read_bytes() != text.encode()]
        if changed:
            sys.exit(f"error: not as built: {', '.join(changed)} in {args.out}")
        print(f"as built: {args.out}")
    else:
        write(args.out, files)
        print("\n".join(f"{count:6,}  {name}" for name, count in counts.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
