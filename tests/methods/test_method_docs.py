"""The documentation lists the methods and settings that the classes declare."""

from __future__ import annotations

import re

import pytest

from rerank_lab.methods import METHODS, labels, settings_of, shown
from rerank_lab.methods.best import Best
from rerank_lab.server import contract
from tests.conftest import ROOT
from tests.test_reports import section, tables

README, PAGE, ENDPOINT, EVALUATION = ((ROOT / name).read_text() for name in ("README.md", "docs/methods.md", "docs/endpoint.md", "docs/evaluation.md"))


def needs(roles: tuple[str, ...]) -> str:
    return "both" if len(roles) == 2 else roles[0]


def plain(cells: dict[str, str]) -> dict[str, str]:
    return {name: cell.replace("`", "") for name, cell in cells.items()}


def test_the_readmes_table() -> None:
    (table,) = tables(section("Methods", README))
    expected = [
        {"method": label, "what it does": about, "needs": needs(METHODS[label].roles) if label in METHODS else "both"} for label, about in labels().items()
    ]
    assert [plain(row) for row in table] == expected


def test_the_page_of_methods() -> None:
    methods, settings, *_ = tables(PAGE)
    wanted = {name: needs(kind.roles) + " (and a cross-encoder, if named)" * kind.optional_cross for name, kind in METHODS.items()}
    assert {row["method"].strip("`"): row["models"] for row in methods} == wanted
    expected = [{"setting": name, "default": shown(own.default), "what it does": own.about} for name, own in settings_of(Best).items()]
    assert [plain(row) for row in settings] == expected
    assert all(f"`{setting}`" in PAGE for kind in METHODS.values() for setting in settings_of(kind))


@pytest.mark.parametrize(
    ("field", "rule"),
    [
        ("method", ""),
        ("model_cross", contract.about_cross().replace("Cross-encoder", "a cross-encoder's id").rstrip(".")),
        ("stage1_top_k", f"documents that {contract.methods_where(lambda kind: 'stage1_top_k' in settings_of(kind))} keep by cosine"),
    ],
)
def test_fields_of_the_contract(field: str, rule: str) -> None:
    (row,) = (plain(row) for row in next(tables(section("Request", ENDPOINT))) if row["field"] == f"`{field}`")
    assert row["rule"].startswith(rule)
    if field == "method":
        assert row["type"].split(", ") == [*METHODS] and row["default"] == contract.DEFAULT


def test_what_a_server_may_be_asked_for() -> None:
    found = re.search(r"the method one of ((?:[^.]|\.\w)*)\.\s", EVALUATION)
    assert found is not None and re.findall("`([^`]*)`", found[1]) == [*labels()]
