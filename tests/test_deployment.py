"""Each command of docs/deployment.md is executed, here or by another test, or parsed by what would run it."""

import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_ray.config import load_config
from moe_ray.serving.api_keys import load_keys
from tests.kustomize import render
from tests.ray_commands import check_ray
from tests.test_containers import services

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
ELSEWHERE = {
    "python -m cluster.local start": "tests/test_local_cluster.py",
    "python -m cluster.local stop": "tests/test_local_cluster.py",
    "source runs/cluster/env": "tests/test_local_cluster.py",
    "export RAY_AUTH_TOKEN_PATH=~/.moe_ray/secrets/token": "tests/test_kuberay.py, with the next",
    ". cluster/node.sh": "tests/test_kuberay.py",
    "ulimit -n 65536": "a builtin of the shell",
}


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def starting(*programs: str) -> list[list[str]]:
    return [shlex.split(line) for line in commands() if line.split()[0] in programs]


def value(words: list[str], option: str) -> str:
    (found,) = [word.partition("=")[2] for word in words if word.startswith(f"--{option}=")]
    return found


def test_no_command_is_forgotten() -> None:
    checked = ("(umask", "ray", "docker", "kubectl", "gcloud", "aws")
    assert [line for line in commands() if line not in ELSEWHERE and line.split()[0] not in checked] == []
    assert set(ELSEWHERE) <= set(commands())


def test_secrets_are_made_for_their_owner_only(tmp_path: Path) -> None:
    environment = os.environ | {"HOME": str(tmp_path)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for line in commands():
        if line.startswith("(umask"):
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", line], cwd=ROOT, env=environment, timeout=60)
            assert done.returncode == 0
    folder = tmp_path / ".moe_ray" / "secrets"
    made = {path.name: path for path in folder.iterdir()}
    assert set(made) == {"token", "api_keys", "grafana-password"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in made.values())
    assert re.fullmatch(r"[0-9a-f]{64}", made["token"].read_text())
    assert [key.name for key in load_keys(str(made["api_keys"]))] == ["my-app"]


def test_ray_does_not_start_without_the_token(tmp_path: Path) -> None:
    script = f". {ROOT}/cluster/node.sh && exec ray start --head --port=0 --temp-dir={tmp_path}/r --block"
    environment = {
        "HOME": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "none"),
    }
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "AuthenticationError" in done.stderr
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("words", starting("ray"), ids=" ".join)
def test_ray_understands(words: list[str]) -> None:
    check_ray(words)
    files = [word for word in words if word.startswith("cluster/")]
    assert all((ROOT / name).is_file() for name in files)


def test_ray_understands_the_commands_of_nodes() -> None:
    found = [line for service in services().values() for line in service.get("command", []) if "ray start" in line]
    for cloud in ("aws", "gcp"):
        config = yaml.safe_load((ROOT / "cluster" / f"{cloud}.yaml").read_text(encoding="utf-8"))
        found += config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert len(found) == 10
    for line in found:
        check_ray(shlex.split(line[line.index("ray st") :]))


def test_docker_gets_files_and_services_that_exist() -> None:
    known = services()
    for words in starting("docker"):
        if words[1] == "build":
            assert words[-1] == "."
            assert words[words.index("--tag") + 1] in ("moe_ray:cpu", "moe_ray:cuda")
            continue
        assert words[1:3] == ["compose", "-f"]
        assert (ROOT / words[3]).is_file()
        if "--scale" in words:
            assert words[words.index("--scale") + 1].partition("=")[0] in known
        if "exec" in words:
            assert words[words.index("exec") + 1] in known
            check_ray(words[words.index("ray") :])
            config, *overrides = words[words.index("python") + 2 :]
            load_config(ROOT / config.removeprefix("/opt/moe_ray/"), overrides)


def test_aws_gets_the_template_and_the_right_that_it_needs() -> None:
    deploy, describe = starting("aws")
    template = ROOT / deploy[deploy.index("--template-file") + 1]
    # Named profiles need this word.
    assert "InstanceProfileName" in template.read_text(encoding="utf-8")
    assert deploy[-1] == "CAPABILITY_NAMED_IAM"
    assert deploy[deploy.index("--stack-name") + 1] == describe[describe.index("--stack-name") + 1]


def test_google_cloud_gets_what_its_file_names() -> None:
    text = (ROOT / "cluster" / "gcp.yaml").read_text(encoding="utf-8")
    config = yaml.safe_load(text)
    found = {tuple(words[1:5]): words for words in starting("gcloud")}
    subnet = found["compute", "networks", "subnets", "create"]
    assert f"regions/{value(subnet, 'region')}/subnetworks/{subnet[5]}" in text
    assert value(subnet, "region") == config["provider"]["region"]
    role = found["iam", "roles", "create", "moe_ray_head"]
    assert (ROOT / value(role, "file")).is_file()
    accounts = {words[4] for words in starting("gcloud") if words[1:4] == ["iam", "service-accounts", "create"]}
    used = set(re.findall(r"([a-z-]+)@my-project\.iam", text))
    assert accounts == used == set(re.findall(r"([a-z-]+)@my-project\.iam", PAGE))
    # The only address that may come in is Identity-Aware Proxy's.
    ranges = [word for words in starting("gcloud") for word in words if word.startswith("--source-ranges")]
    assert ranges == ["--source-ranges=35.235.240.0/20"]


def test_kubectl_gets_the_manifests_and_secrets_that_they_name() -> None:
    secrets, rendered = {}, ""
    for words in starting("kubectl"):
        if "-k" in words:
            rendered += yaml.safe_dump_all(render(ROOT / words[words.index("-k") + 1]))
        elif "-f" in words:
            assert (ROOT / words[words.index("-f") + 1]).is_file()
        elif "secret" in words:
            name = words[words.index("generic") + 1]
            secrets[name] = words[-1].partition("=")[2].partition("=")[0]
    assert secrets == {"moe-ray-token": "auth_token", "moe-ray-api-keys": "keys"}
    assert "secretName: moe-ray-token" in rendered
    keys = re.search(r"secretKeyRef:\n +key: (\S+)\n +name: (\S+)", rendered)
    assert keys is not None
    assert secrets[keys[2]] == keys[1]


@pytest.mark.parametrize(
    "name", sorted(set(re.findall(r"`(test_\w+\.py)`", (ROOT / "docs/security.md").read_text())))
)
def test_the_threat_model_names_tests_that_there_are(name: str) -> None:
    assert (ROOT / "tests" / name).is_file()
