"""What docs/observability.md says of metrics, beside what there is."""

from __future__ import annotations

import re
from pathlib import Path

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
