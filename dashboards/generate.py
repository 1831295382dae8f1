"""Write the dashboards and Prometheus' rules from the catalogue of metrics and the table of alert rules.

usage: python -m dashboards.generate
"""

import json
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards.autoscaling import AUTOSCALING
from dashboards.checkpoints import CHECKPOINTS
from dashboards.cluster import CLUSTER
from dashboards.experts import EXPERTS
from dashboards.serving import SERVING
from dashboards.training import TRAINING
from moe_ray.telemetry.prometheus_rules import rules_yaml

FOLDER = Path(__file__).resolve().parent
DASHBOARDS = (TRAINING, EXPERTS, CHECKPOINTS, SERVING, AUTOSCALING, CLUSTER)


def files() -> dict[str, str]:
    """Content of all generated files by their paths below `dashboards/`."""
    boards = {f"grafana/{board.uid}.json": board for board in DASHBOARDS}
    made = {
        path: json.dumps(board, cls=JSONEncoder, indent=1, sort_keys=True) + "\n" for path, board in boards.items()
    }
    return {**made, "rules.yaml": rules_yaml()}


def main(folder: Path) -> None:
    """Write them."""
    for path, content in files().items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main(FOLDER)
