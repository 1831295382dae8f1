"""Write the OpenAPI document of the endpoint, as `/openapi.json` of one with API keys answers it.

usage: python -m moe_ray.serving.reference [docs/openapi.json]
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from moe_ray.serving.access import Access
from moe_ray.serving.api_keys import ApiKey
from moe_ray.serving.app import make_app
from moe_ray.serving.engine.stats import EngineStats


def document() -> dict[str, Any]:
    """The document, which is the same for all models."""
    no_model = SimpleNamespace(stats=EngineStats, max_http_requests=1)
    return make_app(cast(Any, no_model), Access(keys=(ApiKey("name", bytes(32)),))).openapi()


def main(path: Path) -> None:
    """Bring a file up to date."""
    path.write_text(f"{json.dumps(document(), indent=1)}\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/openapi.json"))
