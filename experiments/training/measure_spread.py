"""python experiments/training/measure_spread.py --model all-MiniLM-L6-v2

Measures the spread of a bi-encoder's token similarities and writes it into the file of those that the package ships
(rerank_lab/data/spreads). An entry of the same weights, configuration, subspace and prompts is replaced; entries of another text, which nothing
takes any more, are dropped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rerank_lab.cli import path_of, place_of, text
from rerank_lab.errors import ModelError, UserError
from rerank_lab.files import write_atomically
from rerank_lab.methods.spread import SHIPPED, entry, measured_text, read_entries, spread_of, with_entry
from rerank_lab.models.base import Overrides
from rerank_lab.models.kinds import load_bi_encoder


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=place_of, default="all-MiniLM-L6-v2", help="bi-encoder: id, folder or hub name")
    p.add_argument("--name", help="what the entry calls the model (default: as --model does)")
    p.add_argument("--subspace", type=place_of, metavar="FILE", help="its token projection (default: the shipped one, or none)")
    p.add_argument("--query-prompt", type=text, metavar="TEXT", help="in place of the model's own")
    p.add_argument("--document-prompt", type=text, metavar="TEXT", help="in place of the model's own")
    p.add_argument("--out", type=path_of, default=SHIPPED, help="the file (default: the package's)")
    options = p.parse_args(argv)
    try:
        asked = Overrides(options.query_prompt, options.document_prompt)
        model = load_bi_encoder(options.model, subspace=options.subspace, device="cpu", overrides=asked)
        model.name = options.name or options.model
        found = entry(model, spread_of(model, known=()))
        others = [one for one in read_entries(options.out) if one.spread.text == measured_text().name] if options.out.exists() else []
        write_atomically(options.out, with_entry(others, found))
    except (UserError, ModelError, OSError) as error:
        print(f"measure_spread: error: {error}", file=sys.stderr)
        return 2
    print(f"{options.out}: {found.model}, {found.spread}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
