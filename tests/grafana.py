"""The committed dashboards, and all that they ask Prometheus."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "dashboards"
BOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((FOLDER / "grafana").glob("*.json"))
}


@dataclass(frozen=True)
class Asked:
    """A query and where it stands."""

    where: str
    expr: str

    def filled(self, window: str = "1m") -> str:
        """As Grafana sends it when everything is chosen."""
        expr = re.sub(r"\$__(rate_)?interval", window, self.expr)
        return re.sub(r"\$[a-z]\w*", ".*", expr)


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of a dashboard that are not headings."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def asked() -> Iterator[Asked]:
    """Every expression of every panel and annotation."""
    for name, board in BOARDS.items():
        for panel in panels(board):
            for target in panel["targets"]:
                yield Asked(f"{name} / {panel['title']} / {target['refId']}", target["expr"])
        for annotation in board["annotations"]["list"]:
            yield Asked(f"{name} / {annotation['name']}", annotation["expr"])
