"""Check an installation, and the health of a run.

usage: python jobs/doctor.py [RUN] [--storage URI] [--json]

Says of each part whether it is ok, and of what is not how to mend it: Python, packages, devices, collectives
between two processes, storage, ports, limits, the compiler, HAProxy and the cluster of RAY_ADDRESS. URI is a
train.storage, by default that of RUN or else ~/moe_ray. Of a RUN it tells the alerts that its logs give now.
Exits with 1 if there is a problem or the run is unhealthy.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial

from jobs.cli import exit_on_error
from moe_ray.config import TrainConfig


def main(arguments: Sequence[str]) -> None:
    """Print what is found and exit."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.ERROR)
    from jobs.checks import INSTALLATION, check_storage

    storage = options.storage or _storage_of(options.run)
    found = [finding for check in INSTALLATION for finding in _shown(check(), options.json)]
    found += _shown(check_storage(storage), options.json)
    if options.run is not None:
        found += _shown(check_run(options.run), options.json)
    if options.json:
        print(json.dumps([asdict(finding) for finding in found]))
    sys.exit(any(finding.level == "problem" for finding in found))


def check_run(given: str) -> Iterator:
    """The alerts that a run's logs give now."""
    from jobs.checks import Finding
    from jobs.monitor import build_watcher

    watcher = build_watcher([given], [], [])
    watcher.round(time.time())
    firing = watcher.alerts.active()
    for alert in firing:
        level = "problem" if alert.rule.severity == "critical" else "warning"
        yield Finding(alert.rule.component, level, f"{alert.rule.name}: {alert.summary}", alert.rule.action)
    if not firing:
        yield Finding("run", "ok", f"{given} raises no alert")


def _shown(findings: Iterator, is_json: bool) -> Iterator:
    for finding in findings:
        if not is_json:
            print(f"{finding.level:<8} {finding.about:<14} {finding.text}", flush=True)
            if finding.fix:
                print(f"{'':<8} {'':<14} fix: {finding.fix}", flush=True)
        yield finding


def _storage_of(run: str | None) -> str:
    if run is None:
        return TrainConfig().storage
    from jobs.monitor import open_run

    return open_run(run)[0].uri


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "jobs/doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", metavar="RUN", help="folder or URI of a run")
    parser.add_argument("--storage", metavar="URI", help="a train.storage to be checked")
    parser.add_argument("--json", action="store_true", help="print one list of objects")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_on_error(partial(main, sys.argv[1:]))
