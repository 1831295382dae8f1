"""The dashboards are those of the generator, complete, readable by Grafana, and ask for metrics that exist."""

import re
import shutil
import subprocess
from itertools import combinations

import promql_parser
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards.foreign import FOREIGN
from dashboards.generate import FOLDER, files
from moe_ray.telemetry.catalogue import CATALOGUE
from moe_ray.telemetry.rules import RULES
from tests.grafana import BOARDS, asked, panels

each_board = pytest.mark.parametrize("name", BOARDS)


def test_files_are_fresh() -> None:
    made = files()
    committed = {f"grafana/{name}.json" for name in BOARDS} | {"rules.yaml"}
    assert committed == set(made)
    stale = [path for path, content in made.items() if (FOLDER / path).read_text(encoding="utf-8") != content]
    assert stale == [], "run `make dashboards`"
    assert files() == made


@pytest.fixture(scope="module")
def selectors() -> list[promql_parser.VectorSelector]:
    """All that the queries select; a query that does not parse fails here."""
    found: list[promql_parser.VectorSelector] = []

    def visit(node: object) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)
        for field in ("expr", "lhs", "rhs", "vector_selector", "vs"):
            if (child := getattr(node, field, None)) is not None:
                visit(child)
        for child in getattr(node, "args", None) or []:
            visit(child)

    for query in asked():
        visit(promql_parser.parse(query.filled()))
    return found
