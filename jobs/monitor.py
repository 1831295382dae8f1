"""Watch runs, endpoints, this machine and a Ray cluster: health, alerts, and metrics for Prometheus.

usage: python jobs/monitor.py [RUN ...] [--endpoint URL ...] [--folder DIR ...] [--host HOST] [--port PORT]
                              [--every SECONDS] [--webhook-file FILE]

RUN is a run's folder or s3:// or gs:// URI. With RAY_ADDRESS set, the nodes and Serve applications of that cluster
are watched too, and what its metrics agents report. http://HOST:PORT/metrics is for Prometheus; /healthz answers
200 while all is healthy or degraded and 503 when something is unhealthy, with reasons and actions as JSON.
Ctrl-C ends it.
"""

import argparse
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import yaml

from cluster.observe import ClusterWatch, agent_samples, endpoint_samples
from jobs.cli import exit_on_error
from moe_ray.config import Config, TelemetryConfig, build_config
from moe_ray.errors import ConfigError
from moe_ray.storage import Storage, open_storage
from moe_ray.telemetry.exporter import Exporter, serve
from moe_ray.telemetry.host import StorageProbe, host_samples
from moe_ray.telemetry.logs import setup_logging
from moe_ray.telemetry.notify import Notify, log_alert, open_webhook
from moe_ray.telemetry.rules import IN_PROCESS
from moe_ray.telemetry.run_log import RUN_SETTINGS
from moe_ray.telemetry.run_watch import RunWatch
from moe_ray.telemetry.watcher import Observe, Watcher, storage_samples


def main(arguments: Sequence[str]) -> None:
    """Watch until a signal."""
    options = _parse(arguments)
    setup_logging(TelemetryConfig())
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    webhook = open_webhook(options.webhook_file)
    watcher = build_watcher(options.runs, options.endpoint, options.folder, [log_alert, *filter(None, [webhook])])
    exporter = Exporter()
    with serve(exporter, options.host, options.port) as port:
        logging.getLogger("moe_ray.monitor").info("http://%s:%d/metrics and /healthz", options.host, port)
        while not ended.is_set():
            now = time.time()
            watcher.round(now)
            exporter.show(watcher, now)
            ended.wait(options.every)
    if webhook is not None:
        webhook.close()


def build_watcher(
    runs: Sequence[str], endpoints: Sequence[str], folders: Sequence[str], notify: Sequence[Notify] = ()
) -> Watcher:
    """A watcher of all that, and of the Ray cluster that RAY_ADDRESS names.

    Raises:
        ConfigError: a run has no settings that can be read, or the name of another.
    """
    found = [open_run(run) for run in runs]
    names = [config.train.name for _, config in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(
            f"several runs are called {sorted(twice)[0]!r}, and metrics tell runs by name.",
            "give a monitor to each of them.",
        )
    watched = [Path(folder).resolve() for folder in folders]
    watched += [storage.local for storage, _ in found if storage.local is not None]
    observers: dict[str, Observe] = {"host": lambda now: host_samples(watched)}
    for storage, config in found:
        name, probe = config.train.name, StorageProbe(storage.uri)
        observers[f"storage of {name}"] = lambda now, name=name, probe=probe: storage_samples(name, probe)
    if endpoints:
        observers["endpoints"] = lambda now: endpoint_samples(endpoints)
    if os.environ.get("RAY_ADDRESS"):
        watch = ClusterWatch()
        observers |= {
            "ray": lambda now: watch.samples(),
            "agents": lambda now: agent_samples(watch.agents, names),
        }
    return Watcher(IN_PROCESS, [RunWatch(*run) for run in found], observers, notify)


def open_run(given: str) -> tuple[Storage, Config]:
    """The storage of a run, and the settings that are stored with it.

    Raises:
        ConfigError: there are none.
    """
    run = open_storage(given, retry_seconds=1.0)
    try:
        config = build_config(yaml.safe_load(run.read(RUN_SETTINGS)))
    except (FileNotFoundError, yaml.YAMLError, RecursionError, ValueError, AttributeError):
        raise ConfigError(
            f"{given!r} is no run: it has no config.yaml.", "give the folder STORAGE/NAME."
        ) from None
    return run, config


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "jobs/monitor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--endpoint", action="append", default=[], metavar="URL", help="whose /readyz is asked")
    parser.add_argument("--folder", action="append", default=[], metavar="DIR", help="whose disk is watched")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=9108, help="port to listen on, 0: a free one (9108)")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS", help="between two rounds (5)")
    parser.add_argument("--webhook-file", metavar="FILE", help="holds the URL to which alerts are POSTed")
    options = parser.parse_args(arguments)
    if not 0 < options.every < threading.TIMEOUT_MAX:
        raise ConfigError(f"--every={options.every:g} is not allowed.", "give a number of seconds above 0.")
    return options


if __name__ == "__main__":
    exit_on_error(partial(main, sys.argv[1:]))
