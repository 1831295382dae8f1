"""The layer rule: a file imports only from its own layer or below, and only the top layers know Ray."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

# Lowest first. The longest matching prefix decides.
LAYERS = (
    (
        "moe_ray.errors",
        "moe_ray.section",
        "moe_ray.explain",
        "moe_ray.presets",
        "moe_ray.durable",
        "moe_ray.model_config",
        "moe_ray.serve_config",
        "moe_ray.sweep_config",
        "moe_ray.config",
        "moe_ray.cpu",
        "moe_ray.private_folder",
        "moe_ray.submission",
    ),
    ("moe_ray.models", "moe_ray.native"),
    (
        "moe_ray.parallel",
        "moe_ray.data",
        "moe_ray.checkpoint",
        "moe_ray.storage",
        "moe_ray.analytics",
        "moe_ray.offload",
        "moe_ray.telemetry",
        "moe_ray.serving.engine",
    ),
    ("moe_ray.ray_metrics",),
    ("moe_ray.training", "moe_ray.tuning", "moe_ray.serving"),
    ("jobs", "serve_apps", "cluster"),
)
LEVEL = {prefix: level for level, prefixes in enumerate(LAYERS) for prefix in prefixes}
FIRST_WITH_RAY = 3
FILES = sorted(path for top in ("moe_ray", "jobs", "serve_apps", "cluster") for path in Path(top).rglob("*.py"))


def level_of(module: str) -> int | None:
    matches = [prefix for prefix in LEVEL if module == prefix or module.startswith(f"{prefix}.")]
    return LEVEL[max(matches, key=len)] if matches else None


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path: Path) -> None:
    module = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
    level = level_of(module)
    if module == "moe_ray":
        level = 0
    assert level is not None, f"{module} belongs to no layer"
    for imported in imports(path):
        assert (level_of(imported) or 0) <= level, f"{module} imports {imported} from a layer above"
        if level < FIRST_WITH_RAY:
            assert imported.partition(".")[0] != "ray", f"{module} imports {imported}"
