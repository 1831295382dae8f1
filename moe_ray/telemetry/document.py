"""Write the catalogue into a page, as tables.

usage: python -m moe_ray.telemetry.document [docs/metrics.md]
"""

import re
import sys
from itertools import groupby
from pathlib import Path

from moe_ray.telemetry.catalogue import CATALOGUE, Metric

_TITLES = {
    "train": "Training",
    "expert": "Experts",
    "checkpoint": "Checkpoints",
    "sweep": "Sweeps",
    "serve": "Serving",
    "cluster": "Cluster, seen by the monitor",
    "host": "Machines and storage, seen by the monitor",
    "storage": "Machines and storage, seen by the monitor",
}
_HEAD = "| Name | Kind | Unit | Labels | Most series | Meaning |\n|---|---|---|---|---:|---|"
_HEALTH = "Health, judged by the monitor"
_TABLES = re.compile(r"(?<=<!-- tables: make docs -->\n).*(?=<!-- end of tables -->)", re.DOTALL)


def with_tables(page: str) -> str:
    """The page with the tables of the catalogue in their place."""
    return _TABLES.sub(lambda _: f"\n{_tables()}\n", page)


def _tables() -> str:
    parts = []
    for title, metrics in groupby(CATALOGUE.values(), lambda metric: _TITLES.get(metric.area, _HEALTH)):
        parts.append("\n".join((f"### {title}\n", _HEAD, *map(_row, metrics), "")))
    return "\n".join(parts)


def _row(metric: Metric) -> str:
    labels = " ".join(f"`{label}`" for label in metric.labels)
    cells = (f"`{metric.exposed_name}`", metric.kind, metric.unit, labels, f"{metric.series:,}", metric.help)
    return f"| {' | '.join(cells)} |"


def main(path: Path) -> None:
    """Bring a page up to date."""
    path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/metrics.md"))
