"""python experiments/collections/build_perlfaq.py --pod DIR --out perlfaq

Makes a collection of questions and answers: the questions of Perl's FAQ, each with its
own answer as the one relevant document, among the sections of Perl's other manuals. DIR
is the folder `pod` of Perl's documentation (Debian: package perl-doc). Prints what
identifies the text; other releases give another collection.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import sys
from pathlib import Path

from rerank_lab.cli import path_of
from rerank_lab.errors import UserError
from rerank_lab.files import write_atomically

SECTIONS = 2000  # of other manuals
SHORTEST, LONGEST = 120, 4000  # characters of a document


def plain(pod: str) -> str:
    """Pod without its marks: commands and formatting codes."""
    text = re.sub(r"(?m)^=(over|back|item|for|begin|end|encoding|cut|pod).*$", "", pod)
    for _ in range(3):  # codes stand within codes
        text = re.sub(r"[A-Z]<(?:<+ )?(?:[^<>|]*\|)?([^<>]*?)(?: >+)?>", r"\1", text)
    return re.sub(r"\n{3,}", "\n\n", text.replace("E<lt>", "<").replace("E<gt>", ">")).strip()


def sections(path: Path) -> list[tuple[str, str]]:
    """(heading, text) of the sections of a manual."""
    parts = re.split(r"(?m)^=head[123] +(.*(?:\n\S.*)*)\n", path.read_text(encoding="utf-8", errors="replace"))
    return [(re.sub(r"\s+", " ", plain(title)), plain(body)[:LONGEST]) for title, body in zip(parts[1::2], parts[2::2])]


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--pod", type=path_of, required=True, metavar="DIR", help="Perl's folder of manuals")
    p.add_argument("--out", type=path_of, required=True, metavar="DIR")
    options = p.parse_args()
    try:
        faq = [s for i in range(1, 10) for s in sections(options.pod / f"perlfaq{i}.pod") if s[0].endswith("?") and len(s[1]) >= SHORTEST]
        others = [s for path in sorted(options.pod.glob("perl*.pod")) if not re.match(r"perl(faq|toc|\d)", path.name) for s in sections(path)]
        others = [s for s in others if len(s[1]) >= SHORTEST]
        if len(others) < SECTIONS:
            raise UserError(f"only {len(others)} sections in {options.pod}: install the package perl-doc")
    except (UserError, OSError) as error:
        print(f"build_perlfaq: error: {error}", file=sys.stderr)
        return 2
    chosen = random.Random(0).sample(others, SECTIONS)
    records = [{"_id": f"faq{i}", "text": body} for i, (_, body) in enumerate(faq)]
    records += [{"_id": f"s{i}", "title": title, "text": body} for i, (title, body) in enumerate(chosen)]
    corpus = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(options.out / "corpus.jsonl", corpus)
    write_atomically(options.out / "queries.jsonl", "".join(json.dumps({"_id": f"q{i}", "text": q}, ensure_ascii=False) + "\n" for i, (q, _) in enumerate(faq)))
    judged = "".join(f"q{i}\tfaq{i}\t1\n" for i in range(len(faq)))
    write_atomically(options.out / "qrels" / "train.tsv", f"query-id\tcorpus-id\tscore\n{judged}")
    print(f"{options.out}: {len(faq)} questions, {len(records)} documents, sha256 {hashlib.sha256(corpus.encode()).hexdigest()[:16]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
