"""The Kubernetes manifests are what KubeRay and Kubernetes understand, and shut by default."""

import copy
import ctypes
import functools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from cluster.ingress import RESILIENCE
from moe_ray.config import load_config
from moe_ray.serve_config import ServeConfig
from tests.kustomize import Manifest, render

ROOT = Path(__file__).resolve().parents[1]
KUBERAY = ROOT / "cluster" / "kuberay"
CRDS = ROOT.parent / "shared" / "kuberay-crds"
FOLDERS = ("base", "overlays/cpu", "overlays/gpu", "jobs")
OVERLAYS = ("overlays/cpu", "overlays/gpu")


def manifests(folder: str, kind: str) -> list[Manifest]:
    return [item for item in render(KUBERAY / folder) if item["kind"] == kind]


def cluster_specs(folder: str) -> list[dict[str, Any]]:
    """Of the cluster for training and of the one of the endpoint."""
    clusters = [item["spec"] for item in manifests(folder, "RayCluster")]
    return clusters + [item["spec"]["rayClusterConfig"] for item in manifests(folder, "RayService")]


def pod_templates(folder: str) -> list[dict[str, Any]]:
    return [
        group["template"]
        for spec in cluster_specs(folder)
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    ]


def close(schema: Any) -> Any:
    """A CRD's schema as the API server reads it with strict field validation: what is not named is refused."""
    if isinstance(schema, list):
        return [close(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: close(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        closed.pop("type", None)
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict) and not is_open:
        closed["additionalProperties"] = False
    return closed


@functools.cache
def crd(kind: str) -> jsonschema.Draft202012Validator:
    file = CRDS / f"ray.io_{kind.lower()}s.yaml"
    if not file.exists():
        pytest.skip("KubeRay's CRDs are not here")
    # A megabyte of YAML, for which the parser in Python takes a minute.
    versions = yaml.load(file.read_text(encoding="utf-8"), yaml.CSafeLoader)["spec"]["versions"]
    (schema,) = [item["schema"]["openAPIV3Schema"] for item in versions if item["storage"]]
    closed = close(schema)
    # The server knows more of metadata than the CRD says.
    closed["properties"]["metadata"] = {"type": "object"}
    return jsonschema.Draft202012Validator(closed)


@pytest.mark.parametrize("folder", FOLDERS)
def test_kuberay_accepts_its_kinds(folder: str) -> None:
    found = [item for item in render(KUBERAY / folder) if item["apiVersion"] == "ray.io/v1"]
    assert found
    for item in found:
        crd(item["kind"]).validate(item)


def test_a_misspelt_field_of_kuberay_is_noticed() -> None:
    (cluster,) = manifests("base", "RayCluster")
    broken = copy.deepcopy(cluster)
    container = broken["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    container["resource"] = container.pop("resources")
    with pytest.raises(jsonschema.ValidationError, match="'resource' was unexpected"):
        crd("RayCluster").validate(broken)


@pytest.mark.parametrize("folder", FOLDERS)
def test_kubernetes_accepts_its_own_kinds(folder: str) -> None:
    for item in render(KUBERAY / folder):
        if "ray.io" not in item["apiVersion"] and "coreos" not in item["apiVersion"]:
            kubernetes_validate.validate(item, "1.33", strict=True)
    for template in pod_templates(folder) if folder != "jobs" else []:
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template["metadata"]}}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, "1.33", strict=True)


@pytest.mark.slow
def test_kustomize_renders_the_same(tmp_path: Path) -> None:
    """By kustomize's own library, which a package for a newer Python carries."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    package = ["--python-version=3.14", f"--dest={tmp_path}", "pykustomize==0.1.4"]
    if subprocess.run([*command, *package], capture_output=True).returncode:
        pytest.skip("pykustomize is not to be had")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        name = "pykustomize/_lib/linux-amd64/libpykustomize.so"
        library = ctypes.CDLL(archive.extract(name, tmp_path))
    for folder in FOLDERS:
        theirs = {identity(item): item for item in _kustomize(library, KUBERAY / folder)}
        ours = {identity(item): item for item in render(KUBERAY / folder)}
        assert theirs == ours


def _kustomize(library: ctypes.CDLL, folder: Path) -> list[Manifest]:
    result = ctypes.c_char_p()
    failed = library.pykustomize_build(str(folder).encode(), b"{}", ctypes.byref(result))
    assert not failed, ctypes.string_at(library.pykustomize_last_error())
    assert result.value is not None
    return list(yaml.safe_load_all(result.value))


def identity(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


@pytest.mark.parametrize("folder", OVERLAYS)
def test_pods_are_restricted(folder: str) -> None:
    """Kubernetes' restricted profile, and a root file system that cannot be written to."""
    for template in pod_templates(folder):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"]
            assert container["resources"]["limits"]["memory"]
            assert {"readinessProbe", "livenessProbe"} <= set(container)
            mounts = {mount["name"] for mount in container["volumeMounts"]}
            assert mounts == {volume["name"] for volume in spec["volumes"]}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all(set(volume) == {"name", "emptyDir"} for volume in spec["volumes"])


@pytest.mark.parametrize("folder", OVERLAYS)
def test_ray_demands_a_token_from_a_secret(folder: str) -> None:
    for spec in cluster_specs(folder):
        assert spec["authOptions"] == {"mode": "token", "secretName": "moe-ray-token"}
        assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0), "older ones know no token"
    (settings,) = manifests(folder, "ConfigMap")
    assert settings["data"]["RAY_AUTH_MODE"] == "token"
    # An endpoint without keys would answer anybody, so its pods do not start without that secret.
    for template in pod_templates(folder):
        if template["metadata"]["labels"]["moe-ray/part"] == "serve":
            (keys,) = template["spec"]["containers"][0]["env"]
            assert keys["name"] == "MOE_RAY_API_KEYS"
            assert "optional" not in keys["valueFrom"]["secretKeyRef"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_secret_is_in_the_manifests(folder: str) -> None:
    assert manifests(folder, "Secret") == []


def test_nodes_have_the_variables_of_the_local_cluster() -> None:
    """Those of `cluster/node.sh` and of the ConfigMap are the same, and the ingress' are the local cluster's."""
    script = f". {ROOT}/cluster/node.sh && env -0"
    environment = {"PATH": "/usr/bin:/bin"}
    output = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    pairs = dict(line.split("=", 1) for line in output.stdout.split("\0") if line.startswith("RAY_"))
    assert pairs.pop("RAY_AUTH_TOKEN_PATH") == "/home/ray/secrets/token"
    (settings,) = manifests("base", "ConfigMap")
    assert settings["data"] == pairs
    assert RESILIENCE.items() <= pairs.items()


@pytest.mark.parametrize("folder", OVERLAYS)
def test_network_is_shut_but_for_what_is_named(folder: str) -> None:
    policies = {item["metadata"]["name"]: item["spec"] for item in manifests(folder, "NetworkPolicy")}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            # A rule without `from` admits everybody, and an address may be anybody's.
            assert rule["from"], name
            assert all("ipBlock" not in source for source in rule["from"]), name
            ports = {port for template in pod_templates(folder) for port in port_names(template)}
            assert {item["port"] for item in rule.get("ports", [])} <= ports
    (names, storage) = policies["storage-and-names"]["egress"]
    assert storage["to"][0]["ipBlock"]["except"] == ["169.254.0.0/16"]
    assert {item["port"] for item in names["ports"]} == {53}


def port_names(template: dict[str, Any]) -> set[str]:
    return {port["name"] for port in template["spec"]["containers"][0]["ports"]}


@pytest.mark.parametrize("folder", OVERLAYS)
def test_selectors_select_pods(folder: str) -> None:
    labels = [template["metadata"]["labels"] for template in pod_templates(folder)]
    budgets = [item["spec"]["selector"]["matchLabels"] for item in manifests(folder, "PodDisruptionBudget")]
    policies = [item["spec"]["podSelector"].get("matchLabels", {}) for item in manifests(folder, "NetworkPolicy")]
    (monitor,) = manifests(folder, "PodMonitor")
    for selector in [*budgets, *policies, monitor["spec"]["selector"]["matchLabels"]]:
        assert any(selector.items() <= item.items() for item in labels), selector
    # Two budgets of one pod forbid every eviction.
    assert all(sum(budget.items() <= item.items() for budget in budgets) == 1 for item in labels)
    ports = {port for template in pod_templates(folder) for port in port_names(template)}
    assert {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]} <= ports


@pytest.mark.parametrize("folder", OVERLAYS)
def test_the_autoscaler_has_room_and_limits(folder: str) -> None:
    for spec in cluster_specs(folder):
        assert spec["enableInTreeAutoscaling"] is True
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        for group in spec["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] < group["maxReplicas"]


def test_the_gpu_overlay_asks_for_gpus() -> None:
    for spec in cluster_specs("overlays/gpu"):
        (group,) = spec["workerGroupSpecs"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "moe_ray:cuda"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert group["template"]["spec"]["tolerations"]


@pytest.mark.parametrize("folder", OVERLAYS)
def test_serve_accepts_the_application(folder: str) -> None:
    (service,) = manifests(folder, "RayService")
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "serve_apps.moe_lm:build"
    settings = {key.removeprefix("serve."): value for key, value in application.args.items()}
    assert settings.pop("checkpoint").startswith("s3://")
    ServeConfig.model_validate({key: yaml.safe_load(value) for key, value in settings.items()})
    ports = {
        port["containerPort"]
        for template in pod_templates(folder)
        for port in template["spec"]["containers"][0]["ports"]
        if port["name"] == "serve"
    }
    assert ports == {config.http_options.port}
    # Texts that have begun may finish.
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert group["template"]["spec"]["terminationGracePeriodSeconds"] > ServeConfig().drain_seconds


def test_jobs_run_commands_that_there_are() -> None:
    clusters = {item["metadata"]["name"] for item in manifests("base", "RayCluster")}
    jobs = manifests("jobs", "RayJob")
    assert jobs
    for job in jobs:
        assert job["spec"]["clusterSelector"]["ray.io/cluster"] in clusters
        assert job["spec"]["submissionMode"] == "HTTPMode"
        python, script, config, *overrides = job["spec"]["entrypoint"].split()
        assert python == "python"
        assert (ROOT / script.removeprefix("/opt/moe_ray/")).is_file()
        load_config(ROOT / config.removeprefix("/opt/moe_ray/"), overrides)
