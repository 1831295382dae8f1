"""`ray up cluster/aws.yaml` against an emulated AWS: what it makes is private, and `ray down` ends it."""

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from cluster.head import fetch
from tests.conftest import free_port
from tests.waiting import until

# The emulator takes half a minute to read AWS's own policies.
pytestmark = pytest.mark.slow
CLUSTER = Path(__file__).resolve().parents[1] / "cluster"
# Write down what they are asked for; nothing leaves the machine.
SHIM = """#!/bin/sh
printf '%s\\n' "$(basename "$0") $*" >> {log}
case "$*" in
    # The updater asks for the image's environment.
    *"json .Config.Env"*) echo '["HOME=/home/ray", "PATH=/opt/venv/bin:/usr/bin"]';;
    *uptime*) echo up;;
esac
"""


@dataclass(frozen=True)
class Cloud:
    """An emulated AWS that has the foundation, and a home folder to work from."""

    folder: Path
    environment: dict[str, str]
    outputs: dict[str, str]

    @property
    def log(self) -> str:
        """What would have been done over SSH."""
        return (self.folder / "log").read_text(encoding="utf-8")

    def client(self, service: str) -> Any:
        return boto3.client(
            service,
            region_name="us-west-2",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="none",
            aws_secret_access_key="none",
        )

    def instances(self, state: str) -> list[dict[str, Any]]:
        filters = [{"Name": "instance-state-name", "Values": [state]}]
        found = self.client("ec2").describe_instances(Filters=filters)["Reservations"]
        return [instance for reservation in found for instance in reservation["Instances"]]

    def ray(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(Path(sys.executable).parent / "ray"), *arguments],
            env=self.environment,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    port = free_port()
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_EC2_METADATA_DISABLED": "true",
        "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    _write_shims(tmp_path)
    with subprocess.Popen(
        [str(Path(sys.executable).parent / "moto_server"), "-H", "127.0.0.1", "-p", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            yield Cloud(tmp_path, environment, _lay_foundation(Cloud(tmp_path, environment, {})))
        finally:
            server.terminate()


def _write_shims(folder: Path) -> None:
    (folder / "bin").mkdir()
    for name in ("ssh", "rsync", "scp"):
        shim = folder / "bin" / name
        shim.write_text(SHIM.format(log=folder / "log"))
        shim.chmod(0o700)


def _lay_foundation(cloud: Cloud) -> dict[str, str]:
    until(lambda: _answers(cloud), 60)
    formation = cloud.client("cloudformation")
    template = (CLUSTER / "aws-foundation.yaml").read_text(encoding="utf-8")
    formation.create_stack(StackName="moe-ray", TemplateBody=template, Capabilities=["CAPABILITY_NAMED_IAM"])
    (stack,) = formation.describe_stacks(StackName="moe-ray")["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    return {item["OutputKey"]: item["OutputValue"] for item in stack["Outputs"]}


def _answers(cloud: Cloud) -> bool:
    try:
        return fetch(f"{cloud.environment['AWS_ENDPOINT_URL']}/moto-api/", "") is not None
    except OSError:
        return False


def _configure(cloud: Cloud) -> Path:
    """The file with what a user sets: the outputs of the stack."""
    text = (CLUSTER / "aws.yaml").read_text(encoding="utf-8")
    for placeholder, output in (("subnet-" + "0" * 17, "SubnetId"), ("sg-" + "0" * 17, "SecurityGroupId")):
        assert placeholder in text
        text = text.replace(placeholder, cloud.outputs[output])
    secrets = cloud.folder / ".moe_ray" / "secrets"
    secrets.mkdir(parents=True)
    (secrets / "token").write_text("0" * 64)
    file = cloud.folder / "aws.yaml"
    file.write_text(text)
    return file


@pytest.mark.timeout(900)
def test_a_cluster_comes_up_in_private_and_goes_down(cloud: Cloud) -> None:
    config = _configure(cloud)
    cloud.ray("up", "--no-config-cache", "-y", str(config))
    (head,) = cloud.instances("running")
    assert head["InstanceType"] == "m7i.2xlarge"
    assert head["SubnetId"] == cloud.outputs["SubnetId"]
    assert "PublicIpAddress" not in head
    assert head["IamInstanceProfile"]["Arn"].endswith("/moe-ray-head")
    _check_groups(cloud, head)
    # Ray made no role of its own, which could do everything on EC2 and S3.
    roles = {role["RoleName"] for role in cloud.client("iam").list_roles()["Roles"]}
    assert not {role for role in roles if "ray-autoscaler" in role}
    assert stat.S_IMODE(next(cloud.folder.glob(".ssh/*.pem")).stat().st_mode) == 0o600
    _check_commands(cloud, head)
    cloud.ray("down", "-y", str(config))
    assert cloud.instances("running") == []


def _check_groups(cloud: Cloud, head: dict[str, Any]) -> None:
    assert [group["GroupId"] for group in head["SecurityGroups"]] == [cloud.outputs["SecurityGroupId"]]
    (group,) = cloud.client("ec2").describe_security_groups(GroupIds=[cloud.outputs["SecurityGroupId"]])[
        "SecurityGroups"
    ]
    assert [rule["UserIdGroupPairs"][0]["GroupId"] for rule in group["IpPermissions"]] == [group["GroupId"]]
    assert all(not rule["IpRanges"] for rule in group["IpPermissions"])


def _check_commands(cloud: Cloud, head: dict[str, Any]) -> None:
    """Everything goes through Session Manager; token and settings come before Ray."""
    ssh = [line for line in cloud.log.splitlines() if line.startswith("ssh ")]
    assert ssh
    assert all("aws ssm start-session" in line for line in ssh)
    assert f"ubuntu@{head['InstanceId']}" in cloud.log
    (run,) = [line for line in cloud.log.splitlines() if "docker run" in line]
    assert "--shm-size=10g" in run
    assert ":/home/ray/secrets" in run
    (start,) = [line for line in cloud.log.splitlines() if "ray start" in line]
    assert "cluster/node.sh" in start
    assert "--head" in start


def test_the_foundation_gives_single_rights(cloud: Cloud) -> None:
    iam = cloud.client("iam")
    policies = {
        policy["PolicyName"]: iam.get_policy_version(
            PolicyArn=policy["Arn"], VersionId=policy["DefaultVersionId"]
        )["PolicyVersion"]["Document"]
        for policy in iam.list_policies(Scope="Local")["Policies"]
    }
    assert len(policies) == 2
    for document in policies.values():
        for statement in document["Statement"]:
            actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
            assert not [action for action in actions if "*" in action]
            if statement["Resource"] == "*":
                assert all(action.startswith("ec2:Describe") for action in actions)
