"""What `kubectl kustomize` prints of a folder, for the parts of kustomize that cluster/kuberay uses.

Anything else in a kustomization is an error. `tests/test_kuberay.py` compares it with kustomize itself.
"""

from pathlib import Path
from typing import Any

import jsonpatch
import yaml

Manifest = dict[str, Any]
_CLUSTER_SCOPED = ("Namespace", "PriorityClass")


def render(folder: Path) -> list[Manifest]:
    """All manifests of a kustomization."""
    settings = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    unknown = set(settings) - {"apiVersion", "kind", "namespace", "resources", "images", "patches"}
    assert not unknown, f"this does not know {unknown}"
    manifests = [item for name in settings["resources"] for item in _load(folder / name)]
    for patch in settings.get("patches", []):
        operations = yaml.safe_load((folder / patch["path"]).read_text(encoding="utf-8"))
        matching = [index for index, item in enumerate(manifests) if _is_target(item, patch["target"])]
        assert matching, f"nothing is {patch['target']}"
        for index in matching:
            manifests[index] = jsonpatch.apply_patch(manifests[index], operations)
    for image in settings.get("images", []):
        _set_tag(manifests, image)
    if "namespace" in settings:
        for item in manifests:
            if item["kind"] not in _CLUSTER_SCOPED:
                item["metadata"]["namespace"] = settings["namespace"]
    return manifests


def _load(path: Path) -> list[Manifest]:
    if path.is_dir():
        return render(path)
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def _is_target(manifest: Manifest, target: dict[str, str]) -> bool:
    return manifest["kind"] == target["kind"] and manifest["metadata"]["name"] == target["name"]


def _set_tag(value: Any, image: dict[str, str]) -> None:
    if isinstance(value, list):
        for item in value:
            _set_tag(item, image)
    elif isinstance(value, dict):
        if value.get("image") == image["name"]:
            value["image"] = f"{image['name']}:{image['newTag']}"
        for item in value.values():
            _set_tag(item, image)
