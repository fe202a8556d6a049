"""python experiments/collections/cut_documents.py COLLECTION --out DIR

Makes a collection of mixed lengths of one whose documents are alike: half of its
documents, drawn by --seed, keep their title and the first sentence of their text.
Queries and judgements stay as they are. COLLECTION is a folder in BEIR's layout or
the name of a bundled one; the text of each document is that of the evaluation.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import sys
from pathlib import Path

from rerank_lab.cli import path_of
from rerank_lab.datasets.beir import BUNDLED
from rerank_lab.errors import UserError
from rerank_lab.files import write_atomically

SENTENCE = re.compile(r"[.!?](?=\s)|\n\s*\n")


def first_sentence(text: str) -> str:
    """The text up to the end of its first sentence or paragraph; a signature alone on the first line is left out."""
    head, _, rest = text.partition("\n\n")
    own = rest if rest.strip() and "\n" not in head and re.fullmatch(r"[\w.]+\(.*\)", head.strip()) else text
    found = SENTENCE.search(own)
    return own if found is None else own[: found.end()].strip()


def cut(lines: list[str], seed: int) -> tuple[str, int]:
    """The corpus with half of its documents cut, as JSON lines, and how many were cut."""
    lines = [line for line in lines if line.strip()]
    chosen = set(random.Random(seed).sample(range(len(lines)), len(lines) // 2))
    records = [json.loads(line) for line in lines]
    for i in chosen:
        records[i]["text"] = first_sentence(records[i]["text"])
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), len(chosen)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("collection", help="a folder in BEIR's layout, or the name of a bundled collection")
    p.add_argument("--out", type=path_of, required=True, metavar="DIR")
    p.add_argument("--seed", type=int, default=0)
    options = p.parse_args()
    folder = Path(options.collection)
    folder = folder if folder.is_dir() else BUNDLED / options.collection
    try:
        if not (folder / "corpus.jsonl").is_file():
            raise UserError(f"{options.collection}: no folder with a corpus.jsonl, and no bundled collection")
        if options.out.resolve() == folder.resolve():
            raise UserError(f"--out {options.out} is the collection itself, whose texts would be lost; name another folder")
        corpus, count = cut((folder / "corpus.jsonl").read_text(encoding="utf-8").split("\n"), options.seed)
        write_atomically(options.out / "corpus.jsonl", corpus)
        shutil.copyfile(folder / "queries.jsonl", options.out / "queries.jsonl")
        shutil.copytree(folder / "qrels", options.out / "qrels", dirs_exist_ok=True)
    except (UserError, OSError, ValueError, KeyError) as error:
        print(f"cut_documents: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {count} documents cut to a sentence")
    return 0


if __name__ == "__main__":
    sys.exit(main())
