"""python experiments/collections/build_training_text.py --out text

Makes text of other kinds for experiments/training/train_cross_encoder.py, from what a
Debian system carries: text/debian, the descriptions of 4,000 packages (after
`apt-get -o Acquire::Languages=en update`), and text/manpages, up to 1,850
manual pages (packages manpages, manpages-dev and whatever else is installed)
under their DESCRIPTION, with 300 of their NAME lines as queries. Prints what
identifies the descriptions; other releases give other texts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

from rerank_lab.cli import path_of
from rerank_lab.errors import UserError
from rerank_lab.files import write_atomically

LISTS, APT_HELPER = Path("/var/lib/apt/lists"), "/usr/lib/apt/apt-helper"
PAGES = {"1": 700, "2": 300, "3": 600, "7": 100, "8": 150}
LEFT_OUT = re.compile(
    r"-(dev|doc|dbg|dbgsym|data|common|l10n.*)$|^lib.*-(dev|perl|java)$|^(golang|librust|node|fonts|texlive|task)-|transitional|dummy|metapackage"
)


def descriptions(count: int, rng: random.Random) -> list[dict[str, str]]:
    """Package descriptions of at least 200 characters. Of those with the same beginning, only the first is taken."""
    files = sorted(LISTS.glob("*_main_i18n_Translation-en*"), key=lambda f: f.stat().st_size)[-1:]  # the release, not its updates
    text = "".join(subprocess.run([APT_HELPER, "cat-file", str(f)], capture_output=True, text=True, check=True).stdout for f in files)
    print(f"descriptions: sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}")
    found: dict[str, dict[str, str]] = {}
    for paragraph in text.split("\n\n"):
        name = re.search(r"^Package: (\S+)", paragraph, re.MULTILINE)
        body = re.search(r"^Description-en: (.*)\n((?: .*\n?)*)", paragraph, re.MULTILINE)
        if name is None or body is None or LEFT_OUT.search(f"{name[1]} {body[1]}"):
            continue
        own = re.sub(r"(?m)^ ", "", body[2].replace("\n .\n", "\n\n")).strip()
        if len(own) >= 200:
            found.setdefault(own[:120], {"_id": name[1], "title": body[1].strip(), "text": own})
    if len(found) < count:
        raise UserError(f"only {len(found)} package descriptions in {LISTS}: apt-get -o Acquire::Languages=en update")
    return rng.sample(list(found.values()), count)


def manual_pages(rng: random.Random) -> list[tuple[str, str]]:
    """(text of the NAME line, DESCRIPTION) of manual pages whose NAME line has at least three words."""
    found = []
    for section, count in PAGES.items():
        paths = sorted(p for p in Path(f"/usr/share/man/man{section}").glob("*.gz") if not p.is_symlink())
        for path in rng.sample(paths, min(count, len(paths))):
            command = ["man", "--no-hyphenation", "--no-justification", "-E", "utf8", "-P", "cat", str(path)]
            shown = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"MANWIDTH": "300", "LC_ALL": "C.UTF-8"}).stdout
            text = re.sub(r".\x08|\x1b\[[0-9;]*m", "", shown)
            name = re.search(r"^NAME\n(.*?)\n(?=^\S)", text, re.DOTALL | re.MULTILINE)
            body = re.search(r"^DESCRIPTION\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
            says = re.split(r" [-–—]+ ", re.sub(r"\s+", " ", name[1]).strip(), maxsplit=1) if name else []
            own = re.sub(r"[ \t]+", " ", body[1]).strip()[:4000] if body else ""
            if len(says) == 2 and len(says[1].split()) >= 3 and len(own) >= 150:
                found.append((says[1], own))
    if len(found) < 600:
        raise UserError(f"only {len(found)} manual pages here: install manpages, manpages-dev and man-db")
    return found


def jsonl(records: list[dict[str, str]]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=path_of, required=True, metavar="DIR")
    options = p.parse_args()
    try:
        packages = descriptions(4000, random.Random(0))
        pages = manual_pages(random.Random(1))
    except (UserError, OSError, subprocess.CalledProcessError) as error:
        print(f"build_training_text: error: {error}", file=sys.stderr)
        return 2
    asked = random.Random(2).sample(range(len(pages)), 300)
    write_atomically(options.out / "debian" / "corpus.jsonl", jsonl(packages))
    write_atomically(options.out / "manpages" / "corpus.jsonl", jsonl([{"_id": f"m{i}", "text": own} for i, (_, own) in enumerate(pages)]))
    write_atomically(options.out / "manpages" / "queries.jsonl", jsonl([{"_id": f"q{i}", "text": pages[i][0]} for i in asked]))
    judged = "".join(f"q{i}\tm{i}\t1\n" for i in asked)
    write_atomically(options.out / "manpages" / "qrels" / "train.tsv", f"query-id\tcorpus-id\tscore\n{judged}")
    print(f"{options.out}: {len(packages)} package descriptions, {len(pages)} manual pages, {len(asked)} queries for them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
