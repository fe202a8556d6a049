"""python experiments/constants/collect_logits.py FILE.npz --collection COLLECTION --split train --cache DIR

Adds the shipped cross-encoder's logits of the same documents to a file of collect.py
(made with all-MiniLM-L6-v2), as the array `logit`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import numpy as np

from rerank_lab.cli import path_of
from rerank_lab.datasets.load import load_dataset
from rerank_lab.errors import UserError
from rerank_lab.reranker import Reranker


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file", type=path_of)
    p.add_argument("--collection", required=True)
    p.add_argument("--split", default="train")
    p.add_argument("--cache", type=path_of, required=True)
    options = p.parse_args()
    started = time.time()
    try:
        data = load_dataset(options.collection, options.split)
        with np.load(options.file) as file:
            arrays = {name: file[name] for name in file.files}
        facts = json.loads(str(arrays["facts"]))
        if facts["hash"] != data.hash:
            raise UserError(f"{options.file} is of another collection or split than {options.collection}, {options.split}")
        reranker, texts, logits = Reranker(method="standard", cache_dir=options.cache, cache_bytes=64 << 30), list(data.corpus.values()), []
        for query, places in zip(facts["queries"], arrays["place"].astype(int).reshape(len(facts["queries"]), -1)):
            ranking = reranker.score(data.queries[query], [texts[i] for i in places])
            own = np.zeros(len(places), dtype=np.float32)
            own[ranking.order] = ranking.scores.numpy()
            logits.append(own)
    except (UserError, OSError, KeyError) as error:
        print(f"collect_logits: error: {error}", file=sys.stderr)
        return 2
    arrays["logit"] = np.concatenate(logits).astype(np.float32)
    np.savez(options.file, **arrays)
    print(f"{options.file.name}: {len(logits)} queries, {time.time() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
