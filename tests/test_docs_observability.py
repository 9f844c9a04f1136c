"""What docs, dashboard and alerts say of metrics, beside what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from router.metrics import Metrics

ROOT = Path(__file__).parent.parent
_ROW = re.compile(r"^\| `(router_\w+)(?:\{([\w,]+)\})?` \|", re.MULTILINE)


def there() -> dict[str, tuple[str, ...]]:
    """Every metric's name, as it stands on the page, and its labels."""
    metrics = Metrics()
    metrics.policy("5d0c3a1b2f77", 1, 1)
    found = {}
    for collector, names in metrics._registry._collector_to_names.items():
        (family,) = collector.collect()
        suffix = "_total" if family.type == "counter" else ""
        name = "router_policy_info" if family.name == "router_policy_number" else family.name + suffix
        assert family.name in names
        found[name] = tuple(getattr(collector, "_labelnames", ()))
    return found | {"router_policy_info": ("version",)}


def test_the_docs_list_every_metric_with_its_labels_and_no_other() -> None:
    text = (ROOT / "docs" / "observability.md").read_text(encoding="utf-8")
    told = {name: tuple(labels.split(",")) if labels else () for name, labels in _ROW.findall(text)}
    assert len(told) > 25
    assert told == there()


# What Prometheus makes of a histogram.
_PARTS = ("_bucket", "_sum", "_count")
_NAME = re.compile(r"\brouter_\w+")
# Label matchers, and labels that sums are taken by.
_MATCHER = re.compile(r"(router_\w+)\{([^{}]*)\}")
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "router.json").read_text(encoding="utf-8"))
RULES = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text(encoding="utf-8"))


def expressions() -> dict[str, str]:
    """Every expression of the dashboard and of the alerts, by where it stands."""
    panels = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
    }
    variables = {one["name"]: one.get("definition", "") for one in DASHBOARD["templating"]["list"]}
    alerts = {rule["alert"]: rule["expr"] for group in RULES["groups"] for rule in group["rules"]}
    return panels | variables | alerts


def of_page(name: str) -> str:
    """The metric that a sample's name belongs to."""
    return next((name.removesuffix(part) for part in _PARTS if name.endswith(part)), name)


def test_every_name_in_dashboard_and_alerts_is_a_metric_on_the_page() -> None:
    metrics = there()
    used = {of_page(name) for text in expressions().values() for name in _NAME.findall(text)}
    assert len(used) > 25
    assert used <= metrics.keys()
    # The dashboard shows them all.
    shown = {
        of_page(name)
        for panel in DASHBOARD["panels"]
        for target in panel.get("targets", ())
        for name in _NAME.findall(target["expr"])
    }
    assert shown == metrics.keys()


def test_every_label_in_an_expression_is_one_of_its_metric() -> None:
    metrics = there()
    own = {"job", "instance", "le"}
    for place, text in expressions().items():
        for name, matchers in _MATCHER.findall(text):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
            assert labels <= own | set(metrics[of_page(name)]), place
        labels = {label for by in re.findall(r"by \(([\w, ]+)\)", text) for label in by.split(", ")}
        known = {label for name in _NAME.findall(text) for label in metrics[of_page(name)]}
        assert labels <= own | known, place
        assert all(text.count(left) == text.count(right) for left, right in ("()", "{}", "[]")), place


def test_rates_are_of_counters_alone() -> None:
    for place, text in expressions().items():
        for name in re.findall(r"(?:rate|increase)\((router_\w+)", text):
            assert name.endswith(("_total", *_PARTS)), place


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    assert DASHBOARD["schemaVersion"] >= 41
    assert DASHBOARD["id"] is None  # or importing it would replace another
    assert DASHBOARD["uid"]
    panels = DASHBOARD["panels"]
    numbers = [panel["id"] for panel in panels]
    assert len(set(numbers)) == len(numbers) > 30
    sources = {one["name"] for one in DASHBOARD["templating"]["list"] if one["type"] == "datasource"}
    assert sources == {"datasource"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
        assert panel["type"] in ("row", "timeseries", "stat", "bargauge")
        if panel["type"] != "row":
            assert panel["targets"]
            assert {one["datasource"]["uid"] for one in (panel, *panel["targets"])} == {"${datasource}"}
            letters = [target["refId"] for target in panel["targets"]]
            assert len(set(letters)) == len(letters)


def test_every_alert_says_what_it_is_about() -> None:
    rules = [rule for group in RULES["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 5
    for rule in rules:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")
