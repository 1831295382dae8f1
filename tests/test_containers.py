"""Dockerfile and compose file: linted, closed, and in agreement with the tree. No image is built here."""

import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_pydantic import ComposeSpecification
from dockerfile_parse import DockerfileParser
from pydantic import ValidationError

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
COMPOSE = ROOT / "cluster" / "compose.yaml"
NAME_AND_TAG = re.compile(r"(?:[a-z0-9_-]+/)?[a-z0-9_-]+:[a-z0-9$][A-Za-z0-9._${}-]*")


def instructions() -> list[dict[str, Any]]:
    parser = DockerfileParser(fileobj=(ROOT / "Dockerfile").open("rb"))
    return [item for item in parser.structure if item["instruction"] != "COMMENT"]


def values(name: str) -> list[str]:
    return [item["value"] for item in instructions() if item["instruction"] == name]


def copied() -> list[tuple[str, str]]:
    """Paths of the tree that go into the build, and where to."""
    found = []
    for value in values("COPY"):
        *sources, target = value.split()
        if not value.startswith("--from"):
            found += [(source, target) for source in sources]
    return found


def services() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([str(BIN / "hadolint"), str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_image_runs_as_nobody_special_and_tells_its_health() -> None:
    order = [item["instruction"] for item in instructions()]
    last_stage = order[len(order) - order[::-1].index("FROM") :]
    assert values("USER") == ["1000"]
    assert "RUN" not in last_stage[last_stage.index("USER") :]
    (check,) = values("HEALTHCHECK")
    command = json.loads(check[check.index("[") :])
    assert command[:2] == ["python", "-c"]
    compile(command[2], "HEALTHCHECK", "exec")
    assert "RAY_AUTH_MODE=token" in " ".join(values("ENV"))


def test_bases_have_tags_and_no_registry() -> None:
    images = [value.split()[0] for value in values("FROM")]
    images += [service["image"] for service in services().values()]
    for image in images:
        assert NAME_AND_TAG.fullmatch(image), image
        assert not image.endswith(":latest")


def test_what_is_copied_exists_and_is_let_through() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    assert "*" in rules
    assert {source.rstrip("/") for source, _ in copied()} == allowed
    assert all((ROOT / name).exists() for name in allowed)


def test_secrets_and_runs_stay_out_of_the_image() -> None:
    allowed = [
        rule.removeprefix("!")
        for rule in (ROOT / ".dockerignore").read_text().splitlines()
        if rule.startswith("!")
    ]
    for path in ("runs", ".venv", ".git", ".env", "token", "tests"):
        assert not any(fnmatch.fnmatch(path, rule) for rule in allowed)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_commands_install_what_runs(tmp_path: Path) -> None:
    """The RUN lines of the build stage, in a copy of what the build sees and in an environment of its own."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    if shutil.which("uv", path=path) is None:
        pytest.skip("there is no uv")
    environment = os.environ | {"PATH": path, "TORCH_BACKEND": "", "UV_NO_CACHE": "0", "VIRTUAL_ENV": ""}
    for name, value in re.findall(r"(UV_[A-Z_]+)=(\S+)", values("ENV")[0]):
        environment.setdefault(name, value)
    folder, venv = tmp_path / "build", tmp_path / "venv"
    folder.mkdir()
    stage = 0
    for item in instructions():
        stage += item["instruction"] == "FROM"
        if stage == 1 and item["instruction"] == "COPY":
            *sources, _ = item["value"].split()
            for source in sources:
                _copy(ROOT / source, folder / source)
        elif stage == 1 and item["instruction"] == "RUN" and "pip install --no-cache-dir uv" not in item["value"]:
            command = item["value"].replace("/opt/venv", str(venv))
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=800,
            )
            assert done.returncode == 0, done.stderr
    # From another folder, so that nothing of the source is found by chance.
    script = "import cluster.local, jobs.train, moe_ray.native.build as b, serve_apps.moe_lm; assert b._HEADERS"
    subprocess.run([str(venv / "bin" / "python"), "-c", script], cwd=tmp_path, check=True, timeout=200)
    for program in ("ray", "serve"):
        assert (venv / "bin" / program).exists()


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def test_debian_has_the_packages() -> None:
    (install,) = [value for value in values("RUN") if "apt-get install" in value]
    words = shlex.split(install.partition("apt-get install")[2].partition("&&")[0])
    packages = [word for word in words if not word.startswith("--")]
    if shutil.which("apt-cache") is None or not any(Path("/var/lib/apt/lists").glob("*Packages*")):
        pytest.skip("there are no lists of Debian's packages")
    done = subprocess.run(["apt-cache", "show", *packages], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compose_accepts_the_file() -> None:
    content = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    # What begins with x- means nothing to Compose, and the model does not know it.
    content = {key: value for key, value in content.items() if not key.startswith("x-")}
    ComposeSpecification.model_validate(content)
    content["services"]["head"]["restrat"] = "always"
    with pytest.raises(ValidationError, match="restrat"):
        ComposeSpecification.model_validate(content)


def test_containers_can_do_little() -> None:
    for name, service in services().items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "devices", "pid"} & set(service), name
        # Of ours by the image, of others by this.
        assert service["image"].startswith("moe_ray:") or service["user"] == "1000", name


def test_ray_demands_the_token_and_ports_are_of_this_machine() -> None:
    for name, service in services().items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        if service["image"].startswith("moe_ray:"):
            assert service["environment"]["RAY_AUTH_MODE"] == "token"
            assert service["environment"]["RAY_AUTH_TOKEN_PATH"] == "/run/secrets/token"
            assert service["secrets"] == ["token"]
    secrets = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["secrets"]
    assert all(set(secret) == {"file"} for secret in secrets.values())


def test_ports_agree() -> None:
    """Those that are published, that commands name, and that dashboards and Prometheus look at."""
    known = services()
    published = {int(port.rpartition(":")[2]) for port in known["head"]["ports"]}
    prometheus = yaml.safe_load((ROOT / "dashboards" / "prometheus.yaml").read_text(encoding="utf-8"))
    (ours,) = [job for job in prometheus["scrape_configs"] if job["job_name"] == "moe_ray"]
    monitor = known["monitor"]["command"]
    (target,) = ours["static_configs"][0]["targets"]
    assert target == f"127.0.0.1:{monitor[monitor.index('--port') + 1]}"
    source = ROOT / "dashboards" / "provisioning" / "datasources" / "prometheus.yaml"
    (datasource,) = yaml.safe_load(source.read_text(encoding="utf-8"))["datasources"]
    assert datasource["url"] == known["head"]["environment"]["RAY_PROMETHEUS_HOST"] == "http://127.0.0.1:9090"
    assert "--web.listen-address=0.0.0.0:9090" in known["prometheus"]["command"]
    # 8265 and 8000 are Ray's defaults, 3000 is Grafana's.
    assert published == {8265, 8000, 9090, 3000}
    exposed = {int(port) for port in values("EXPOSE")[0].split()}
    assert {6379, 8265, 8000, 8080} == exposed
    assert "--port=6379" in known["head"]["command"][-1]
    assert "--address=head:6379" in known["worker"]["command"][-1]


def test_paths_exist() -> None:
    for service in services().values():
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert not source.startswith(".") or (COMPOSE.parent / source).exists(), volume
        words = " ".join(service.get("command", [])).split()
        for word in words:
            if re.match(r"(jobs|cluster)/", word):
                assert (ROOT / word).is_file(), word
            if "/etc/moe_ray/dashboards/" in word:
                assert (ROOT / "dashboards" / word.rpartition("/etc/moe_ray/dashboards/")[2]).is_file(), word
    grafana = services()["grafana"]["environment"]
    for name in ("GF_PATHS_PROVISIONING", "MOE_RAY_DASHBOARDS"):
        assert (ROOT / grafana[name].removeprefix("/etc/moe_ray/")).is_dir()
    provisioned = (ROOT / "dashboards/provisioning/dashboards/moe_ray.yaml").read_text(encoding="utf-8")
    assert all(name in grafana for name in re.findall(r"\$([A-Z_]+)", provisioned))
