"""Lines of the journal and files of timings, in the format of the last release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rerank_lab.eval.journal import Journal
from rerank_lab.eval.records import ColdCost, Record

LINE = (
    '{"query": "q1", "documents": ["d2", "d1"], "scores": [0.9, 0.5], "relevance": [0.8, 0.25], "candidates": 2, "seconds": 0.0625, '
    '"phases": {"encode": 0.045, "rank": 0.0004}, "flops": 320, "flops_new": 397, "truncated": 1, "peak_rss_mb": 673.5, "by": "local"}'
)
SERVERS = LINE[: LINE.index('"phases"')] + '"phases": null, "flops": null, "flops_new": null, "truncated": null, "peak_rss_mb": null, "by": "local"}'
TIMINGS = '{"seconds": [0.5], "phases": [{"encode": 0.25}], "documents": 100, "peak_rss_mb": 700.5, "measured": "2026-11-01T10:00:00Z"}'


@pytest.mark.parametrize("line", [LINE, SERVERS], ids=["local", "server"])
def test_a_line_is_read_and_written_as_it_was(line: str) -> None:
    record = Record.parse(line)
    assert record.line() == line and record.documents == ["d2", "d1"] and (record.cost is None) == (line == SERVERS)


def test_a_list_of_records_ends_where_it_is_damaged(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "out", resume=True, overwrite=False)
    journal.begin({})
    path = journal.partial / "fast.jsonl"
    for damaged in ('{"query": "torn', LINE.replace('"by": "local"', '"who": "local"'), "[1]", LINE):  # the last without its end
        path.write_text(f"{LINE}\n{SERVERS}\n{damaged}")
        assert [record.line() for record in journal.records("fast")] == [LINE, SERVERS]
        assert path.read_text() == f"{LINE}\n{SERVERS}\n"


def test_timings_are_read_and_written_as_they_were() -> None:
    assert ColdCost.read(TIMINGS, 1).write().decode() == TIMINGS
    for wrong in (TIMINGS.replace("[0.5]", "[]"), TIMINGS.replace("measured", "when"), "[]", "{", json.dumps(json.loads(TIMINGS) | {"seconds": 1})):
        with pytest.raises((ValueError, TypeError)):
            ColdCost.read(wrong, 1)
