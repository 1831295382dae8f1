"""HAProxy in front of the replicas of a local cluster."""

import os
import subprocess
import sys
import textwrap

import psutil
import pytest

from cluster.head import fetch
from cluster.ingress import find_haproxy, high_throughput
from cluster.local import ClusterError, LocalCluster
from cluster.processes import find_marked
from tests.conftest import free_port
from tests.waiting import until

SCRIPT = textwrap.dedent("""
    import sys
    import ray
    from ray import serve

    @serve.deployment(ray_actor_options={"num_cpus": 0.1})
    class Empty:
        async def __call__(self, request):
            return "ok"

    ray.init()
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
    serve.run(Empty.bind())
""")


@pytest.mark.cluster
@pytest.mark.timeout(400)
def test_haproxy_is_the_default_and_listens_on_this_machine_only(tmp_path):
    if find_haproxy() is None:
        pytest.skip("there is no HAProxy")
    cluster, port = LocalCluster(tmp_path / "c"), free_port()
    try:
        head = cluster.start()
        assert head.proxy == "haproxy"
        with pytest.raises(ClusterError, match="'plain' is asked for"):
            cluster.start(proxy="plain")
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(port)],
            env=os.environ | cluster.environment(head),
            timeout=200,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        until(lambda: answers(port))
        listening = {
            (process.name(), connection.laddr.ip)
            for process in find_marked(head.temp_dir)
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert ("haproxy", "127.0.0.1") in listening
        # Each replica has a port on all interfaces, for other deployments, that asks for the cluster's token.
        others = {name for name, address in listening if address not in ("127.0.0.1", "::ffff:127.0.0.1")}
        assert others <= {"ray::ServeReplica:default:Empty"}
    finally:
        cluster.stop()


def test_ports_of_replicas_are_none_that_ray_has_by_default(tmp_path):
    """HTTP, dashboard, gRPC and client: a replica that is there first would take them."""
    for _ in range(100):
        ports = high_throughput(tmp_path, tmp_path / "haproxy")
        for kind in ("HTTP", "GRPC"):
            least, most = (int(ports[f"RAY_SERVE_DIRECT_INGRESS_{end}_{kind}_PORT"]) for end in ("MIN", "MAX"))
            assert not {8000, 8265, 9000, 10001} & set(range(least, most + 1))
            assert most < 20_000


def test_sockets_have_short_paths_for_users_with_long_ids(tmp_path):
    # Ray puts the name of the node between folder and file.
    folder, node = f"/tmp/moe_ray-{2**32 - 1}/01234567/p", "n" * 56
    variables = high_throughput(tmp_path, tmp_path / "haproxy")
    for name in ("SOCKET_PATH", "METRICS_SOCKET_PATH"):
        file = variables[f"RAY_SERVE_HAPROXY_{name}"].removeprefix(f"{tmp_path}/")
        assert len(f"{folder}/{node}/{file}") <= 97


def answers(port: int) -> bool:
    try:
        return fetch(f"http://127.0.0.1:{port}/", "") == b"ok"
    except OSError:
        return False
