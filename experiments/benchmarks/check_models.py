"""python experiments/benchmarks/check_models.py --checkpoints FOLDER: every model folder in FOLDER against its reference

Each folder in FOLDER is loaded as what it is, ranks documents for two queries, and its
scores are compared with those of the reference: sentence-transformers, or the formula
of the model's authors (experiments/references). Short texts, and texts past the limit
of the model where that is at most 9,000 tokens. What is refused is listed with the reason.

Exit code 1 if a score differs by more than 1e-4. A sparse encoder's score is a sum of
hundreds of products: its difference is a share of the score. --write FILE.md puts the table between
the lines <!-- check_models --> and <!-- end --> of the file.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

import torch
from tqdm import tqdm

from rerank_lab import Reranker
from rerank_lab.cli import path_of
from rerank_lab.datasets import load_dataset
from rerank_lab.errors import UserError
from rerank_lab.first_stage.splade import Index
from rerank_lab.models.families import BI, CAUSAL, CROSS, LATE, SPARSE, STATIC, family
from rerank_lab.models.folder import Folder
from rerank_lab.models.sparse import SparseModel

sys.path.insert(0, str(Path(__file__).parent.parent / "references"))
TOLERANCE = 1e-4
LONGEST = 9_000  # tokens of a limit that long texts still pass
WHOLE = 1 << 20  # max_tokens_per_doc, so that only the model's own limit cuts
BEGIN, END = "<!-- check_models -->", "<!-- end -->"
Scores = Callable[[str, Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Check:
    """A comparison of one folder with one reference.

    Attributes:
        name: of the folder.
        read_as: the family, and the method whose scores are compared.
        short, long: largest difference; None: refused, or no such texts.
        limit: tokens of a text or a pair that the model reads.
        refusal: why the model is not scored; None: it is.
    """

    name: str
    read_as: str
    short: float | None = None
    long: float | None = None
    limit: int | None = None
    refusal: str | None = None

    @property
    def equal(self) -> bool:
        """Whether no score differs, or the model is refused."""
        return self.refusal is not None or all(found <= TOLERANCE for found in (self.short, self.long) if found is not None)

    def row(self) -> str:
        """A row of the table."""
        if self.refusal is not None:
            return f"| {self.name} | refused | | | {self.refusal} |"
        cells = ["" if found is None else f"{found:.1e}" for found in (self.short, self.long)]
        return f"| {self.name} | {self.read_as} | {' | '.join(cells)} | {'equal' if self.equal else '**differs**'} |"


def ways(folder: Path) -> Iterator[tuple[str, int, Scores, Scores]]:
    """Each score that a model has: what is compared, the model's limit, our scores, and the reference's.

    Raises:
        UserError: the model is refused.
    """
    files = Folder(folder, str(folder))
    kind = family(files)[0]
    if kind == SPARSE or (not files.modules and files.architecture.endswith("ForMaskedLM")):
        model = SparseModel(files)
        yield "sparse encoder, `splade`", model.limit, partial(_words_in_common, model), _reference("sparse_encoder", folder)
    elif kind in (CROSS, CAUSAL):
        ranks = Reranker(None, "standard", str(folder), max_tokens_per_doc=WHOLE, device="cpu")
        assert ranks.cross is not None
        reference = "causal" if kind == CAUSAL and not files.modules else "cross_encoder"
        yield f"{kind}, `standard`", ranks.cross.limit, partial(_scores, ranks), _reference(reference, folder)
    else:
        assert kind in (BI, STATIC, LATE)
        ranks = Reranker(str(folder), "maxsim", max_tokens_per_doc=WHOLE, device="cpu")
        assert ranks.encoder is not None
        if ranks.encoder.pools:
            yield f"{kind}, `fast`", ranks.encoder.limit, partial(_scores, ranks.using("fast")), _reference("bi_encoder", folder)
        if kind == LATE or (folder / "colbert_linear.pt").is_file():
            reference = "late_interaction" if kind == LATE else "token_head"
            yield f"{kind}, `maxsim`", ranks.encoder.limit, partial(_scores, ranks), _reference(reference, folder)


def _reference(name: str, folder: Path) -> Scores:
    """The reference's scores of a folder, by experiments/references/NAME.py."""
    found: Scores = partial(import_module(name).scores, folder)
    return found


def _scores(reranker: Reranker, query: str, documents: Sequence[str]) -> Sequence[float]:
    ranking = reranker.score(query, documents)
    found = torch.empty(len(documents), dtype=torch.float32)
    found[ranking.order] = ranking.scores
    return found.tolist()


def _words_in_common(model: SparseModel, query: str, documents: Sequence[str]) -> Sequence[float]:
    index = Index(model.encode(documents, "document"))
    asked = model.encode([query], "query")
    found: list[float] = index.scores(asked.words, asked.weights).tolist()
    return found


def checks(folder: Path) -> Iterator[Check]:
    """Compares all scores of a model with their references."""
    corpus = load_dataset("numpydoc")
    documents, queries = list(corpus.corpus.values()), list(corpus.queries.values())[:2]
    try:
        for read_as, limit, ours, reference in ways(folder):
            share = read_as.startswith(SPARSE)
            short = _difference(ours, reference, queries, documents[:6], share)
            # A token has at most some eight characters in these texts; half of the limit more is past it.
            size = 8 * limit * 3 // 2 if limit <= LONGEST else 8 * 1_000
            text = " ".join(documents)
            text = text * -(-(size + 10_000) // len(text))
            long = _difference(ours, reference, queries, [text[start : start + size] for start in (0, 5_000)], share)
            yield Check(folder.name, read_as, short, long, limit)
    except UserError as error:
        yield Check(folder.name, "", refusal=_reason(str(error), folder))


def _difference(ours: Scores, reference: Scores, queries: Sequence[str], documents: Sequence[str], share: bool) -> float:
    """The largest difference of scores; with `share`, as a share of the score where that is above 1."""
    largest = 0.0
    for query in queries:
        # In fp64: a score of 1000 has no digits behind the third place in fp32.
        found, wanted = (torch.tensor(scores(query, documents), dtype=torch.float64) for scores in (ours, reference))
        gap = (found - wanted).abs() / (wanted.abs().clamp_min(1) if share else 1)
        largest = max(largest, gap.max().item())
    return largest


def _reason(message: str, folder: Path) -> str:
    """A refusal without the model's name and folder."""
    said = re.sub(r"^model '[^']*':? ", "", message).replace(f"{folder}/", "").replace(str(folder), "the folder").replace(f"{folder.parent}/", "")
    return said.replace("|", "\\|")


def table(found: Sequence[Check]) -> str:
    """The comparisons as Markdown."""
    head = ["| checkpoint | read as | short texts | long texts | |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *(one.row() for one in found)])


def main() -> int:
    """Runs the command and returns its exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoints", type=path_of, required=True, metavar="FOLDER", help="holds a folder for each model")
    p.add_argument("--write", type=path_of, metavar="FILE.md", help="put the table there (default: print it)")
    p.add_argument("names", nargs="*", help="only these folders (default: all)")
    options = p.parse_args()
    logging.getLogger("rerank_lab").setLevel(logging.ERROR)
    folders = [folder for folder in sorted(options.checkpoints.iterdir()) if folder.is_dir() and (not options.names or folder.name in options.names)]
    if not folders:
        p.error(f"{options.checkpoints} holds no such folder")
    found = [one for folder in tqdm(folders, disable=None) for one in checks(folder)]
    if options.write is None:
        print(table(found))
    else:
        text = options.write.read_text(encoding="utf-8")
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            p.error(f"{options.write} has no lines {BEGIN} and {END}")
        options.write.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}", encoding="utf-8")
    return int(not all(one.equal for one in found))


if __name__ == "__main__":
    sys.exit(main())
