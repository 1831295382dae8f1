"""PromQL in the catalogue's names: written as Prometheus sees them, filtered by the dashboard's variables."""

import re
from dataclasses import dataclass

from dashboards.foreign import FOREIGN, Foreign
from moe_ray.telemetry.catalogue import CATALOGUE, Metric

# The variable that chooses the values of a label, whoever names it.
VARIABLES = {
    "run": "run",
    "layer": "layer",
    "replica": "replica",
    "app": "app",
    "application": "app",
    "ip": "node",
    "NodeAddress": "node",
}
# Its `app` is the endpoint's address.
_UNFILTERED = {"moe_cluster_ready"}
_SERIES = re.compile(r"\b((?:moe|ray|autoscaler)_\w+|ALERTS\b|up\b)(?:\{([^{}]*)\})?")
_EXPOSED = {metric.exposed_name: metric for metric in CATALOGUE.values()}


@dataclass(frozen=True)
class Query:
    """An expression and the name of its series.

    Attributes:
        text: PromQL in names of the catalogue or of `FOREIGN`, without filters by variables.
        legend: Grafana's template, such as `{{run}}`.
    """

    text: str
    legend: str

    @property
    def expr(self) -> str:
        """What is sent to Prometheus."""
        return _SERIES.sub(_filtered, self.text)

    @property
    def metrics(self) -> list[Metric | Foreign]:
        """In the order in which they stand in it."""
        return [_find(match[1])[0] for match in _SERIES.finditer(self.text)]


def exposed(name: str) -> str:
    """The name of a metric as Prometheus sees it."""
    metric, suffix = _find(name)
    return (metric.exposed_name if isinstance(metric, Metric) else metric.name) + suffix


def _find(name: str) -> tuple[Metric | Foreign, str]:
    """The metric of that name, and the suffix of one of a histogram's series."""
    for stem, suffix in ((name, ""), *((name.removesuffix(s), s) for s in ("_bucket", "_sum", "_count"))):
        metric = CATALOGUE.get(stem) or _EXPOSED.get(stem) or FOREIGN.get(stem)
        if metric is not None:
            return metric, suffix
    raise AssertionError(f"{name} is neither in the catalogue nor in FOREIGN")


def _filtered(match: re.Match[str]) -> str:
    metric, _ = _find(match[1])
    labels = [label for label in metric.labels if label in VARIABLES and metric.name not in _UNFILTERED]
    filters = [f'{label}=~"${VARIABLES[label]}"' for label in labels]
    matchers = ",".join([*filters, match[2]] if match[2] else filters)
    return exposed(match[1]) + (f"{{{matchers}}}" if matchers else "")
