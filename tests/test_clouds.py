"""The files for `ray up` say what Ray and the clouds understand, and open nothing."""

import copy
import gzip
import json
import re
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import botocore.session
import googleapiclient
import jsonschema
import moto
import pytest
import yaml
from botocore.validate import ParamValidator
from cfnlint.decode import decode
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).resolve().parents[1] / "cluster"
CLOUDS = ("aws", "gcp")


def load(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text(encoding="utf-8"))


def node_types(cloud: str) -> list[dict[str, Any]]:
    return list(load(cloud)["available_node_types"].values())


def start_commands(cloud: str) -> list[str]:
    config = load(cloud)
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def google_schema(service: str, name: str) -> dict[str, Any]:
    """JSON schema of a Google API's object, closed, from the discovery document that its client brings along."""
    folder = files(googleapiclient) / "discovery_cache" / "documents"
    schemas = json.loads((folder / f"{service}.json").read_text(encoding="utf-8"))["schemas"]
    return {"$ref": f"#/$defs/{name}", "$defs": {key: _json_schema(value) for key, value in schemas.items()}}


def _json_schema(value: dict[str, Any]) -> dict[str, Any]:
    if "$ref" in value:
        return {"$ref": f"#/$defs/{value['$ref']}"}
    schema = {key: value[key] for key in ("type", "enum") if value.get(key) not in (None, "any")}
    if value.get("format") in ("int64", "uint64"):
        # Written as strings, taken as numbers too.
        schema["type"] = ["string", "integer"]
    if "items" in value:
        schema["items"] = _json_schema(value["items"])
    if "additionalProperties" in value:
        schema["additionalProperties"] = _json_schema(value["additionalProperties"])
    if "properties" in value:
        schema["properties"] = {key: _json_schema(item) for key, item in value["properties"].items()}
        schema.setdefault("additionalProperties", False)
    return schema


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_accepts_it(cloud: str) -> None:
    config = load(cloud)
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(config | {"max_worker": 1}))


def test_aws_knows_each_setting_of_a_machine() -> None:
    run_instances = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    for node_type in node_types("aws"):
        request = {"MinCount": 1, "MaxCount": 1, **node_type["node_config"]}
        # Ray's own word, of which each request names one.
        (request["SubnetId"],) = request.pop("SubnetIds")
        report = ParamValidator().validate(request, run_instances.input_shape)
        assert not report.has_errors(), report.generate_report()


def test_aws_machines_are_as_large_as_is_said() -> None:
    types = json.loads(gzip.decompress((files(moto) / "ec2/resources/instance_types.json.gz").read_bytes()))
    for node_type in node_types("aws"):
        machine = types[node_type["node_config"]["InstanceType"]]
        gpus = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {}).get("Gpus", []))
        said = node_type["resources"]
        assert said["CPU"] in (0, machine["VCpuInfo"]["DefaultVCpus"])
        assert said.get("GPU", 0) == gpus
        _check_memory("aws", said["CPU"] == 0, machine["MemoryInfo"]["SizeInMiB"] * 2**20)


def test_google_knows_each_setting_of_a_machine() -> None:
    schema = google_schema("compute.v1", "Instance")
    for node_type in node_types("gcp"):
        jsonschema.validate(node_type["node_config"], schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"machineTyp": "n2-standard-8"}, schema)


def test_google_machines_are_as_large_as_is_said() -> None:
    """By their names; Google's table of types is only to be had from its API."""
    gpus_of_vcpus = {24: 2, 48: 4, 96: 8}
    for node_type in node_types("gcp"):
        family, vcpus = re.fullmatch(
            r"(n2|g2)-standard-(2|4|8|16|24|32|48|96)", node_type["node_config"]["machineType"]
        ).groups()
        said = node_type["resources"]
        assert said["CPU"] in (0, int(vcpus))
        assert said.get("GPU", 0) == (gpus_of_vcpus[int(vcpus)] if family == "g2" else 0)
        # 4 GB for each vCPU in both families.
        _check_memory("gcp", said["CPU"] == 0, int(vcpus) * 4 * 2**30)


def _check_memory(cloud: str, is_head: bool, memory: int) -> None:
    """The object store fits into shared memory, and that into half of the machine."""
    config = load(cloud)
    (option,) = config["docker"]["head_run_options" if is_head else "worker_run_options"]
    shared = int(re.fullmatch(r"--shm-size=(\d+)g", option).group(1)) * 2**30
    command = config["head_start_ray_commands" if is_head else "worker_start_ray_commands"][-1]
    store = int(re.search(r"--object-store-memory=(\d+)", command).group(1))
    assert store < shared <= memory / 2


@pytest.mark.parametrize("cloud", CLOUDS)
def test_groups_have_limits_and_start_with_nothing(cloud: str) -> None:
    config = load(cloud)
    types = config["available_node_types"]
    assert set(types) == {"head", "cpu", "gpu", "gpu_spot"}
    assert all(item["min_workers"] == 0 for item in types.values())
    assert 0 < config["max_workers"] <= sum(item["max_workers"] for item in types.values())
    assert all(item["max_workers"] <= config["max_workers"] for item in types.values())


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_runs_with_a_token_and_enough_files(cloud: str) -> None:
    assert len(start_commands(cloud)) == 2
    for command in start_commands(cloud):
        assert command.startswith(". /opt/moe_ray/cluster/node.sh && ulimit -n 65536 && ray start")
    assert "--ulimit=nofile=65536:65536" in load(cloud)["docker"]["run_options"]
    # The folder of the token comes from outside of the tree, and is where node.sh looks for it.
    (remote, local) = next(iter(load(cloud)["file_mounts"].items()))
    assert local.startswith("~/")
    assert f"{remote}/token" in (CLUSTER / "node.sh").read_text(encoding="utf-8")


def test_aws_machines_are_private() -> None:
    config = load("aws")
    assert config["provider"]["use_internal_ips"] is True
    for node_type in node_types("aws"):
        machine = node_type["node_config"]
        # Without a group of ours Ray makes one that opens port 22 to the world.
        assert machine["SecurityGroupIds"]
        assert "NetworkInterfaces" not in machine
        assert machine["MetadataOptions"]["HttpTokens"] == "required"
        assert all(disk["Ebs"]["Encrypted"] for disk in machine["BlockDeviceMappings"])


def test_google_machines_are_private() -> None:
    assert load("gcp")["provider"]["use_internal_ips"] is True
    for node_type in node_types("gcp"):
        assert all("accessConfigs" not in item for item in node_type["node_config"]["networkInterfaces"])
        # Else they get Google's default account, which may edit the whole project.
        (account,) = node_type["node_config"]["serviceAccounts"]
        assert account["email"].startswith("moe-ray-")


def test_cloud_formation_accepts_the_foundation() -> None:
    done = subprocess.run(["cfn-lint", str(CLUSTER / "aws-foundation.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_bucket_is_private_and_encrypted() -> None:
    resources = decode(str(CLUSTER / "aws-foundation.yaml"))[0]["Resources"]
    bucket = resources["Bucket"]["Properties"]
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4
    assert all(bucket["PublicAccessBlockConfiguration"].values())
    assert bucket["BucketEncryption"]
    (statement,) = resources["OnlyEncryptedTraffic"]["Properties"]["PolicyDocument"]["Statement"]
    assert (statement["Effect"], statement["Principal"]) == ("Deny", "*")


def test_roles_on_google_cloud_name_single_permissions() -> None:
    role = load("gcp-head-role")
    jsonschema.validate(role, google_schema("iam.v1", "Role"))
    # Who can set policies or act for other accounts can do anything.
    assert all(re.fullmatch(r"compute\.[a-zA-Z]+\.[a-zA-Z]+", item) for item in role["includedPermissions"])
    assert not any("IamPolicy" in item for item in role["includedPermissions"])
