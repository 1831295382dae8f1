"""Train under faults, and show that nothing was lost: the same run twice, undisturbed and with faults.

usage: python jobs/chaos.py CONFIG [section.field=value ...] [options]
       ray job submit --working-dir . -- python jobs/chaos.py CONFIG [section.field=value ...] [options]

The runs are STORAGE/NAME-reference, which is made once, and STORAGE/NAME-chaos. Prints one line a fault: when it
was detected, when training went on, steps done again and steps with other samples than in the undisturbed run;
then the difference of the losses. Exits with 1 if a sample was lost, a fault cost more steps than a checkpoint
interval explains, or the losses differ. Nodes are killed and drained: use a cluster that nobody else needs.
"""

import argparse
import signal
import sys
import time
from collections.abc import Callable, Sequence

from jobs.cli import exit_on_error
from moe_ray.config import load_config
from moe_ray.errors import ConfigError, TrainingError
from moe_ray.telemetry.logs import setup_logging
from moe_ray.training.chaos.schedule import Fault, plan_faults


def main(options: argparse.Namespace) -> None:
    """Print the schedule, train twice, print the table.

    Raises:
        ConfigError: a fault is unknown, or the run too short for all of them.
        TrainingError: a promise of training was broken.
    """
    config = load_config(options.config, options.overrides)
    faults = _faults(options.faults)
    plan = plan_faults(faults, options.count or len(faults), options.seed, config)
    print("\n".join(f"step {planned.step:>8}  {planned.fault}" for planned in plan), flush=True)
    # Here, so that a mistake in the settings is answered before torch and Ray are imported.
    from moe_ray.training.chaos.faults import Options
    from moe_ray.training.chaos.report import table
    from moe_ray.training.chaos.run import run_chaos
    from moe_ray.training.launcher import connect, with_absolute_storage

    setup_logging(config.telemetry.log_level)
    connect(config.parallel, log_to_driver=False)
    # Ray has just put its own in place; leaving by an exception ends what was started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    outcome = run_chaos(
        with_absolute_storage(config),
        [options.config, *options.overrides],
        plan,
        Options(options.outage_seconds, options.drain_seconds, options.full_disk_mib << 20),
        options.seed,
        _teller(),
    )
    print(f"\n{table(outcome.rows)}\n")
    print(
        f"relative loss difference: final {outcome.loss.final:.1e}, largest {outcome.loss.largest:.1e}", flush=True
    )
    if outcome.wrong:
        raise TrainingError(f"{'; '.join(outcome.wrong)}.", "see the output of the runs, named above.")


def _teller() -> Callable[[str], None]:
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - started:7.1f} s] {text}", flush=True)

    return say


def _faults(text: str) -> list[Fault]:
    try:
        return [Fault(name.strip()) for name in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--faults: {error}.", f"use some of {', '.join(Fault)}.") from None


def _parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="section.field=value", nargs="*")
    parser.add_argument("--faults", default=",".join(Fault), help="some of %(default)s")
    parser.add_argument("--count", type=int, help="how many strike; default: each once")
    parser.add_argument("--seed", type=int, default=0, help="chooses order, steps and victims")
    parser.add_argument("--outage-seconds", type=float, default=5.0, help="a disk is full, or storage cut off")
    parser.add_argument("--drain-seconds", type=int, default=15, help="from a node's announced to its real end")
    parser.add_argument("--full-disk-mib", type=int, default=64, help="a disk with more free MiB is not filled")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    exit_on_error(lambda: main(_parse()))
