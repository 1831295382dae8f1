"""Take the newest node of a local cluster away, as a cloud takes a spot machine: at once, or with notice.

usage: python -m cluster.preempt [cpu|spot] [--notice SECONDS] [--dir DIR]
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from cluster.local import DEFAULT_DIR, ClusterError, LocalCluster
from cluster.nodes import GROUPS, LocalNode, running_nodes
from cluster.processes import end_processes
from jobs.cli import exit_on_error
from moe_ray.errors import ConfigError

_KILL_SECONDS, _DRAIN_SECONDS = 20.0, 60.0


def lose(node: LocalNode) -> None:
    """SIGKILL all processes of a node, as when a cloud takes a spot machine back."""
    survivors = end_processes(node.processes, _KILL_SECONDS)
    assert not survivors, survivors


def drain(node: LocalNode, environment: Mapping[str, str], seconds: int) -> None:
    """Give notice that a node goes in so many seconds, and take it away then.

    Args:
        environment: of a client of the cluster.

    Raises:
        ClusterError: the cluster does not take the notice; the node stays.
    """
    deadline = time.monotonic() + seconds
    options = {
        "address": environment["RAY_ADDRESS"],
        "node-id": node.node_id,
        "reason": "DRAIN_NODE_REASON_PREEMPTION",
        "reason-message": "taken back",
        "deadline-remaining-seconds": seconds,
    }
    command = [str(Path(sys.executable).with_name("ray")), "drain-node"]
    command += [f"--{name}={value}" for name, value in options.items()]
    try:
        subprocess.run(
            command,
            env={**os.environ, **environment},
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            timeout=_DRAIN_SECONDS,
        )
    except subprocess.CalledProcessError as error:
        said = error.stderr.strip().splitlines() or ["nothing"]
        raise _not_taken(node, f"`ray drain-node` said last: {said[-1].rstrip('.')}") from None
    except subprocess.TimeoutExpired:
        raise _not_taken(node, f"no answer for {_DRAIN_SECONDS:.0f} s") from None
    time.sleep(max(0.0, deadline - time.monotonic()))
    lose(node)


def _not_taken(node: LocalNode, reason: str) -> ClusterError:
    return ClusterError(
        f"the cluster did not take the notice for node {node.node_id[-5:]}, which stays: {reason}.",
        "see `python -m cluster.local status`; without --notice the node goes at once.",
    )


def main(options: argparse.Namespace) -> None:
    """Take one node away.

    Raises:
        ConfigError: the notice is no number of seconds.
        ClusterError: there is no such node, or the cluster does not take the notice.
    """
    if options.notice < 0:
        raise ConfigError(f"--notice {options.notice} is negative.", "use seconds, or 0 for no notice.")
    cluster = LocalCluster(options.dir)
    head = cluster.head()
    nodes = [] if head is None else [n for n in running_nodes(head.temp_dir) if n.group == options.group]
    if head is None or not nodes:
        raise ClusterError(
            f"no node of the group {options.group!r} runs.",
            "see `python -m cluster.local status` for those that do.",
        )
    if options.notice:
        drain(nodes[-1], cluster.environment(head), options.notice)
    else:
        lose(nodes[-1])
    print(f"took node {nodes[-1].node_id[-5:]} of the group {options.group} away")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m cluster.preempt", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("group", nargs="?", choices=GROUPS, default="spot")
    parser.add_argument("--notice", type=int, default=0, metavar="SECONDS", help="default: none")
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR)
    exit_on_error(lambda: main(parser.parse_args()))
