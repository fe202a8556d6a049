"""python -m rerank_lab.replay: recorded requests to two servers, and where their answers differ."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from rerank_lab import cli
from rerank_lab.cli import count, non_negative, path_of, positive
from rerank_lab.client.v3 import KEY, TIMEOUT, V3
from rerank_lab.errors import ModelError, UserError

if TYPE_CHECKING:
    from rerank_lab.replay.recorded import ComparedRequest

log = logging.getLogger("rerank_lab")
REPLAY_SCHEMA = 1
EPILOG = f"""\
A line of REQUESTS.jsonl is the body of a request to {V3}:
  {{"model": "all-MiniLM-L6-v2", "query": "…", "documents": ["…", "…"]}}
or a body and the path that it goes to:
  {{"path": "/v1/rerank", "body": {{"query": "…", "documents": ["…", "…"]}}}}

examples:
  python -m rerank_lab.replay requests.jsonl http://a:8000 http://b:8000
      each request to both; where do the answers differ
  python -m rerank_lab.replay requests.jsonl https://api.example.com \\
      http://127.0.0.1:8000 --limit 100 --tolerance 1e-3 --json out.json
      a looser look at the first 100, the differences for a machine too
  python -m rerank_lab.replay requests.jsonl http://a:8000 http://a:8000
      does a server give the same answer twice

what may differ:
  order      at some rank stands another document
  score      of a document, by more than --tolerance
  status     of HTTP; then nothing else is compared
  shape      keys that one answer lacks, or what the body of an error looks like
  set        documents that one ranked and the other did not
  value      in meta, or in a document that is echoed
  no answer  from one of them, or from both

keys: $RERANK_LAB_ENDPOINT_KEY_A and $RERANK_LAB_ENDPOINT_KEY_B, each else
$RERANK_LAB_ENDPOINT_KEY, sent as Authorization: Bearer

exit codes: 0 all the same, 1 differences or a server that does not answer,
2 wrong input, 130 interrupted (what was compared is printed)
"""


def parser() -> argparse.ArgumentParser:
    """The command line of replay."""
    p = argparse.ArgumentParser(
        prog="python -m rerank_lab.replay",
        description="Sends recorded requests to two servers and prints where their answers differ.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("requests", type=path_of, metavar="REQUESTS.jsonl", help="one request a line; blank lines are skipped")
    p.add_argument("a", metavar="URL_A", help="http(s)://host:port, with a path where the server stands behind one")
    p.add_argument("b", metavar="URL_B", help="the same of the other")
    p.add_argument("--tolerance", type=non_negative, default=1e-4, metavar="X", help="absolute difference up to which scores are the same (default: 1e-4)")
    p.add_argument("--concurrency", type=count, default=1, metavar="N", help="requests at a time (default: 1, which is how to compare latency)")
    p.add_argument("--limit", type=count, metavar="N", help="the first N requests only")
    p.add_argument("--timeout", type=positive, default=TIMEOUT, metavar="S", help=f"without a byte, then it is no answer (default: {TIMEOUT:g})")
    p.add_argument("--json", type=path_of, metavar="FILE", help="summary and differences, for machines")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    options = parser().parse_args(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("rerank_lab: %(message)s"))
    log.addHandler(handler)
    done: list[ComparedRequest] = []
    try:
        from tqdm import tqdm

        from rerank_lab.client.endpoint import RemoteServer, check_address, key_from
        from rerank_lab.files import write_atomically
        from rerank_lab.replay.recorded import differences, read_requests, replay, report, summarize

        requests = read_requests(options.requests)[: options.limit]
        urls = [check_address(url, name) for name, url in (("URL_A", options.a), ("URL_B", options.b))]
        if options.json is not None and not (options.json.parent.is_dir() and os.access(options.json.parent, os.W_OK) and not options.json.is_dir()):
            raise UserError(f"--json {options.json} cannot be written: name a file in a folder that is there")
        interrupted = False
        with ExitStack() as connections:
            a, b = (connections.enter_context(closing(RemoteServer(url, key_from(f"{KEY}_{x}", KEY), timeout=options.timeout))) for x, url in zip("AB", urls))
            try:
                done.extend(tqdm(replay(requests, a, b, options.tolerance, options.concurrency), total=len(requests), unit="request", disable=None))
            except KeyboardInterrupt:
                interrupted = True
        done.sort(key=lambda one: one.request.line)
        summary = summarize(done)
        if options.json is not None:
            about = {"schema": REPLAY_SCHEMA, "a": urls[0], "b": urls[1], "tolerance": options.tolerance, "recorded": len(requests), "interrupted": interrupted}
            write_atomically(options.json, json.dumps(about | summary | {"differences": differences(done)}, indent=1) + "\n")
        print(report(done, summary, options.requests, urls))
        if interrupted:
            print(f"\nrerank_lab: interrupted after {len(done)} of {len(requests)} requests", file=sys.stderr)
            return 130
        return int(summary["same"] < len(requests))
    except UserError as error:
        print(f"rerank_lab: error: {error}", file=sys.stderr)
        return 2
    except (ModelError, OSError) as error:
        print(f"rerank_lab: failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrerank_lab: interrupted", file=sys.stderr)
        return 130
    finally:
        log.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(cli.run(main))
