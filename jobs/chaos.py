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
from moe_ray.submission import with_absolute_storage
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
    _check_numbers(options)
    count = len(faults) if options.count is None else options.count
    plan = plan_faults(faults, count, options.seed, config)
    print("\n".join(f"step {planned.step:>8}  {planned.fault}" for planned in plan), flush=True)
    # Here, so that a mistake in the settings is answered before torch and Ray are imported.
    from moe_ray.training.chaos.faults import Options
    from moe_ray.training.chaos.report import table
    from moe_ray.training.chaos.run import run_chaos
    from moe_ray.training.launcher import connect

    setup_logging(config.telemetry)
    connect(config.parallel, log_to_driver=False)
    # Ray has just put its own in place; leaving by an exception ends what was started.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
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
    struck = sum(row.was_run for row in outcome.rows)
    print(f"passed: {struck} of {len(outcome.rows)} faults struck, no sample was lost", flush=True)


def _stop(number: int, _: object) -> None:
    print("stopping: the run that is training saves its step and ends", file=sys.stderr, flush=True)
    sys.exit(128 + number)


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


def _check_numbers(options: argparse.Namespace) -> None:
    least = {"count": 1, "seed": 0, "outage_seconds": 0, "drain_seconds": 1, "full_disk_mib": 1}
    for name, minimum in least.items():
        value = getattr(options, name)
        if value is not None and not minimum <= value < float("inf"):
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}={value} is not allowed.", f"use a number of at least {minimum}.")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of a command line; prints the help and exits if there is none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="section.field=value", nargs="*")
    parser.add_argument("--faults", default=",".join(Fault), help=f"default: all of {', '.join(Fault)}")
    parser.add_argument("--count", type=int, help="how many strike; default: each once")
    parser.add_argument(
        "--seed", type=int, default=0, help="chooses order, steps and victims; default: %(default)s"
    )
    parser.add_argument(
        "--outage-seconds",
        type=float,
        default=5.0,
        help="a disk is full, or storage cut off; default: %(default)s",
    )
    parser.add_argument(
        "--drain-seconds",
        type=int,
        default=15,
        help="from a node's announced to its real end; default: %(default)s",
    )
    parser.add_argument(
        "--full-disk-mib", type=int, default=64, help="a disk with more free is not filled; default: %(default)s"
    )
    if not (sys.argv[1:] if arguments is None else arguments):
        parser.print_help()
        sys.exit(2)
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    exit_on_error(lambda: main(parse()))
