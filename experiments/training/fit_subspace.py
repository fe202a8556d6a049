"""python experiments/training/fit_subspace.py --wordnet /usr/share/wordnet --out rerank_lab/data/subspaces/all-MiniLM-L6-v2.safetensors

Makes a bi-encoder's token projection V: the top uncentred principal directions of 20,000 unit token vectors, half from
the documents of the bundled numpydoc collection, half from WordNet's glosses (the folder `dict` of WordNet 3.0, or
Debian's package wordnet-base), which stand for general English. --text FILE (one text a line) takes their place.
Prints the share of the vectors' energy that V keeps, on texts that it was not fitted on too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from rerank_lab.cli import path_of, place_of
from rerank_lab.datasets.beir import BUNDLED
from rerank_lab.errors import UserError
from rerank_lab.models.bi_encoder import BiEncoder, load
from rerank_lab.models.registry import Placement, Source

WORDNET = ("data.adj", "data.adv", "data.noun", "data.verb")


def numpydoc() -> list[str]:
    lines = (BUNDLED / "numpydoc" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    return [f"{record['title']} {record['text']}" for record in map(json.loads, lines)]


def glosses(folder: Path) -> list[str]:
    """WordNet's definitions and example sentences: the part of each data line after the bar."""
    files = [folder / name for name in WORDNET]
    missing = [str(path) for path in files if not path.is_file()]
    if missing:
        raise UserError(f"not there: {', '.join(missing)}; --wordnet takes WordNet's folder dict (Debian: wordnet-base)")
    return [line.split("|", 1)[1].strip() for path in files for line in path.read_text(encoding="utf-8").splitlines() if " | " in line]


def sample(model: BiEncoder, texts: list[str], count: int, rng: random.Random) -> list[torch.Tensor]:
    """Two samples of `count` unit token vectors, from different random texts: one to fit on, one to check on."""
    shuffled, picked = rng.sample(texts, len(texts)), []
    for part in (shuffled[::2], shuffled[1::2]):
        vectors, total = [], 0
        for start in range(0, len(part), 64):
            vectors.append(model.encode(part[start : start + 64]).tokens.float())
            total += len(vectors[-1])
            if total >= 3 * count:
                break
        if total < count:
            raise UserError(f"only {total} tokens where {count} are needed; give more text or a smaller --tokens")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(rng.randrange(1 << 31)))
        picked.append(torch.cat(vectors)[order[:count]])
    return picked


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=place_of, default="all-MiniLM-L6-v2", help="bi-encoder: id, folder or hub name")
    p.add_argument("--rank", type=int, default=128, help="r, the columns of V (default: 128)")
    p.add_argument("--tokens", type=int, default=20_000, help="token vectors fitted on (default: 20000)")
    p.add_argument("--wordnet", type=path_of, help="WordNet's folder with data.noun and the others")
    p.add_argument("--text", type=path_of, help="general text in WordNet's place, one text a line")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=path_of, required=True)
    options = p.parse_args()
    if (options.wordnet is None) == (options.text is None):
        p.error("give --wordnet or --text")
    try:
        general = glosses(options.wordnet) if options.wordnet else options.text.read_text(encoding="utf-8").splitlines()
        model = load(Source(options.model, "bi-encoder"), Placement("cpu"))
        model.subspace = None
        rng = random.Random(options.seed)
        sources = {"numpydoc": numpydoc(), "wordnet" if options.wordnet else options.text.name: [t for t in general if t.strip()]}
        halves = [sample(model, texts, options.tokens // len(sources), rng) for texts in sources.values()]
    except (UserError, OSError) as error:
        print(f"fit_subspace: error: {error}", file=sys.stderr)
        return 2
    fitted, held = torch.cat([h[0] for h in halves]), torch.cat([h[1] for h in halves])
    V = torch.linalg.svd(fitted, full_matrices=False).Vh[: options.rank].T.contiguous()
    for name, vectors in {"fitted": fitted, **{f"held out, {n}": h[1] for n, h in zip(sources, halves)}, "held out": held}.items():
        print(f"energy kept, {name}: {float((vectors @ V).square().sum() / vectors.square().sum()):.4f}")
    about = {
        "model": model.weights,
        "name": options.model,
        "texts": ", ".join(f"{name} ({hashlib.sha256(chr(10).join(texts).encode()).hexdigest()[:16]})" for name, texts in sources.items()),
        "tokens": str(len(fitted)),
        "seed": str(options.seed),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = options.out.with_suffix(".tmp")
    save_file({"V": V}, temporary, about)
    temporary.replace(options.out)
    print(f"{options.out}: V {tuple(V.shape)} of {options.model} from {about['texts']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
