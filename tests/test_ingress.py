"""HAProxy in front of the replicas of a local cluster."""

import os
import subprocess
import sys
import textwrap

import psutil
import pytest

from cluster.head import fetch
from cluster.ingress import find_haproxy
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


def answers(port: int) -> bool:
    try:
        return fetch(f"http://127.0.0.1:{port}/", "") == b"ok"
    except OSError:
        return False
