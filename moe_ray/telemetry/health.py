"""Whether all is well: each component healthy, degraded or unhealthy, for which reasons and what to do."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from moe_ray.telemetry.alerts import Alert
from moe_ray.telemetry.rules import Component
from moe_ray.telemetry.samples import Sample


class Status(StrEnum):
    """Of a component: a warning degrades it, a critical alert makes it unhealthy."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"


SCORES = {Status.HEALTHY: 1.0, Status.DEGRADED: 0.5, Status.UNHEALTHY: 0.0}


@dataclass(frozen=True)
class Health:
    """The status of what is observed.

    Attributes:
        alerts: that fire, by component; a component without any is healthy.
    """

    alerts: dict[Component, tuple[Alert, ...]]

    @property
    def status(self) -> Status:
        """That of the worst component."""
        return min(map(self.of, self.alerts), key=SCORES.__getitem__, default=Status.HEALTHY)

    def of(self, component: Component) -> Status:
        """Status of a component."""
        severities = {alert.rule.severity for alert in self.alerts[component]}
        if "critical" in severities:
            return Status.UNHEALTHY
        return Status.DEGRADED if severities else Status.HEALTHY

    def samples(self) -> Iterable[Sample]:
        """The score of each component."""
        return [Sample("moe_health_score", {"component": name}, SCORES[self.of(name)]) for name in self.alerts]

    def record(self) -> dict[str, Any]:
        """For JSON: status, and status, reasons and actions of each component."""
        return {
            "status": str(self.status),
            "components": {
                name: {"status": str(self.of(name)), "alerts": [alert.record() for alert in alerts]}
                for name, alerts in self.alerts.items()
            },
        }


def health(firing: Sequence[Alert], components: Iterable[Component]) -> Health:
    """Health of those components, from the alerts that fire."""
    return Health({name: tuple(alert for alert in firing if alert.rule.component == name) for name in components})
