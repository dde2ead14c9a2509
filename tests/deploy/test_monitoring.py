"""The dashboard and the alerts speak of figures that a server has."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
# What Prometheus adds, or has of its own.
OF_PROMETHEUS = {"up": {"job", "instance"}}
OF_TARGETS = {"job", "instance"}
_NAME = re.compile(r"\b(?:hvp|grpc_server)_[a-z_]+\b|\bup\b")
_SELECTOR = re.compile(r"\b([a-z_]+)\{([^}]*)\}")


@pytest.fixture(scope="module", name="dashboard")
def _dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    return found


@pytest.fixture(scope="module", name="rules")
def _rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions(dashboard: dict[str, Any], rules: list[dict[str, Any]]) -> Iterator[str]:
    for panel in dashboard["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    yield from (rule["expr"] for rule in rules)


def test_panels_are_told_apart_and_do_not_overlap(dashboard: dict[str, Any]) -> None:
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["targets"]
            assert panel["description"].endswith(".")
            letters = [target["refId"] for target in panel["targets"]]
            assert len(set(letters)) == len(letters)
            # Whatever server is chosen above is the one that is shown.
            for target in panel["targets"]:
                asked = _NAME.findall(target["expr"])
                assert target["expr"].count('instance=~"$instance"') == len(asked)
    assert {each["name"] for each in dashboard["templating"]["list"]} == {
        *("datasource", "job", "instance"),
    }


def test_every_alert_says_what_is_wrong_and_what_to_do(rules: list[dict[str, Any]]) -> None:
    names = [rule["alert"] for rule in rules]
    assert len(set(names)) == len(names) >= 10
    for rule in rules:
        assert re.fullmatch(r"Hvp[A-Za-z]+", rule["alert"])
        assert rule["labels"]["severity"] in {"warning", "critical"}
        for text in (rule["annotations"]["summary"], rule["annotations"]["description"]):
            assert text.strip().endswith(".")
        assert rule.get("for") or "increase" in rule["expr"]
        # Labels in the words are there after the sums.
        kept = re.search(
            r"^\s*(?:histogram_quantile.*?)?sum by \(([^)]*)\)", rule["expr"], re.DOTALL
        )
        for label in re.findall(r"\$labels\.(\w+)", "".join(rule["annotations"].values())):
            assert label in (kept[1].split(", ") if kept else OF_TARGETS)


def test_brackets_of_expressions_are_closed(
    dashboard: dict[str, Any], rules: list[dict[str, Any]]
) -> None:
    closing = {")": "(", "]": "[", "}": "{"}
    for expression in expressions(dashboard, rules):
        open_ones: list[str] = []
        for letter in re.sub(r'"[^"]*"', "", expression):
            if letter in closing.values():
                open_ones.append(letter)
            elif letter in closing:
                assert open_ones.pop() == closing[letter], expression
        assert not open_ones, expression


def test_every_figure_and_label_is_one_that_a_server_declares(
    dashboard: dict[str, Any], rules: list[dict[str, Any]]
) -> None:
    known = OF_PROMETHEUS | declared()
    assert len(known) > 20
    asked: set[str] = set()
    for expression in expressions(dashboard, rules):
        asked |= set(_NAME.findall(re.sub(r"\{\{.*?\}\}", "", expression)))
        for name, selector in _SELECTOR.findall(expression):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            assert labels <= known[name] | OF_TARGETS, expression
    assert asked <= known.keys()


def declared() -> dict[str, set[str]]:
    """Names of a server's figures as Prometheus stores them, each with its labels."""
    instruments = importlib.import_module("hvp_service.metrics.instruments")
    state = importlib.import_module("hvp_service.metrics.state")
    found = {name: set(labels) for name, (_, labels) in state.FAMILIES.items()}
    endings = {"Counter": ("_total",), "Histogram": ("_bucket", "_sum", "_count"), "Gauge": ("",)}
    for each in vars(instruments).values():
        if hasattr(each, "_labelnames"):
            for ending in endings[type(each).__name__]:
                found[each._name + ending] = {
                    *each._labelnames,
                    *(["le"] if "_b" in ending else []),
                }
    return found
