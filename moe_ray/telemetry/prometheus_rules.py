"""The table of rules as a rule file for Prometheus.

usage: python -m moe_ray.telemetry.prometheus_rules > dashboards/rules.yaml
"""

import sys
from typing import Any

import yaml

from moe_ray.telemetry.rules import COMPONENTS, RULES, Rule


def rules_yaml() -> str:
    """Content of the file: a group for each component."""
    groups = [
        {
            "name": f"moe_ray_{component}",
            "rules": [alerting_rule(rule) for rule in RULES if rule.component == component],
        }
        for component in COMPONENTS
    ]
    header = "# Made by `make dashboards` from moe_ray/telemetry/rules.py.\n"
    return header + yaml.safe_dump({"groups": groups}, sort_keys=False, width=10_000)


def alerting_rule(rule: Rule) -> dict[str, Any]:
    """One alerting rule."""
    labels = {label: f"{{{{ $labels.{label} }}}}" for label in rule.by}
    value = f'{{{{ $value | printf "%.{rule.digits}f" }}}}'
    return {
        "alert": rule.name,
        "expr": rule.promql,
        **({"for": f"{rule.for_seconds}s"} if rule.for_seconds else {}),
        "labels": {"severity": rule.severity, "component": rule.component},
        "annotations": {
            "summary": rule.summary.format(value=value, **labels),
            "action": rule.action,
            "runbook": rule.runbook,
        },
    }


if __name__ == "__main__":
    sys.stdout.write(rules_yaml())
