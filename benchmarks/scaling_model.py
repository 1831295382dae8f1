"""Scale on paper: step time, communication and goodput of a config on 8 to 4,096 GPUs, and a check of it here.

Run `python benchmarks/scaling_model.py jobs/configs/quickstart.yaml model.dim=4096 ...`; each GPU has
`train.micro_batch` sequences a micro-batch (weak scaling), `parallel` is as configured, `ep` the largest that
fits. Formulae and their sources: `moe_ray/analytics/step_model.py` and `scaling_formulae.py`.

`--check` predicts steps on 1, 2 and 4 gloo ranks of this machine with the same formulae, from rates that are
measured between the very steps, and prints what was predicted next to what was measured, and bytes next to
bytes counted.

Profiles: `moe_ray/analytics/profiles.py`. The default rate of failures is that
of Llama 3 (Grattafiori et al. 2024, table 5): 419 unexpected interruptions of 2,048 nodes in 54 days,
one in 6,300 node hours. That counts whatever stops a job, not only broken nodes.
"""

import argparse
import dataclasses
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
from scaling_check import PLANS, check
from scaling_formulae import Faults, checkpointing, outlook

from moe_ray.analytics.profiles import DEVICES, hardware
from moe_ray.analytics.step_model import Hardware, Plan, step_seconds, transfers
from moe_ray.config import Config, load_config
from moe_ray.model_config import divisors

LLAMA3_NODE_HOURS = 2048 * 54 * 24 / 419
PROFILES = {device.name: hardware(device, "bfloat16") for device in DEVICES if device.ranks_per_node > 1}
WORLDS = tuple(2**exponent for exponent in range(3, 13))


def plan_for(config: Config, world: int, accumulation: int) -> Plan:
    """The plan of `config` on `world` ranks."""
    parallel, model = config.parallel, config.model
    limit = world if parallel.ep == "auto" else parallel.ep
    return Plan(
        model,
        world,
        max(ep for ep in divisors(math.gcd(world, model.num_experts)) if ep <= limit),
        config.train.micro_batch * accumulation,
        config.train.micro_batch,
        config.data.sequence_length,
        config.train.dtype,
        parallel.shard_dense,
        parallel.shard_experts,
    )


def predict(plan: Plan, hardware: Hardware, faults: Faults, asynchronous: bool) -> dict[str, Any]:
    """One row of the table; seconds, bytes, shares."""
    parts = step_seconds(plan, hardware)
    step = sum(parts.values())
    nodes = math.ceil(plan.world / hardware.ranks_per_node)
    flops = plan.tokens * plan.model.flops_per_token(plan.sequence_length)
    checkpoint = checkpointing(plan, hardware, asynchronous)
    return {
        "world": plan.world,
        "ep": plan.ep,
        "step_seconds": step,
        "parts": parts,
        "sent_bytes": {name: transfer.sent for name, transfer in transfers(plan).items()},
        "mfu": flops / (step * hardware.peak_flops),
        "tokens_per_second": plan.world * plan.tokens / step,
        "checkpoint": dataclasses.asdict(checkpoint),
        **dataclasses.asdict(outlook(checkpoint, faults, nodes, step)),
    }


def print_predictions(rows: list[dict[str, Any]]) -> None:
    """The table."""
    print(
        "   GPUs    ep  step s  compute  optim  dispatch  reduce  GB/rank   MFU  tokens/s"
        "  ckpt every s  goodput static  elastic"
    )
    for row in rows:
        shares = [
            row["parts"][name] / row["step_seconds"] for name in ("compute", "optimizer", "dispatch", "reduce")
        ]
        sent = sum(row["sent_bytes"].values()) / 1e9
        print(
            f"{row['world']:7}{row['ep']:6}{row['step_seconds']:8.3f}{shares[0]:9.0%}{shares[1]:7.0%}"
            f"{shares[2]:10.0%}{shares[3]:8.0%}{sent:9.2f}{row['mfu']:6.0%}{row['tokens_per_second']:10.3g}"
            f"{row['interval']:14.0f}{row['static']:16.2%}{row['elastic']:9.2%}"
        )


def run_check(rounds: int) -> list[dict[str, Any]]:
    """Measure all plans and print the table."""
    print("world  ep  compute  optim  dispatch  reduce  predicted s  measured s   error  MB sent  predicted MB")
    rows = []
    for plan in PLANS:
        row = check(plan, rounds)
        rows.append(row)
        parts, predicted, measured = row["predicted"], row["predicted_seconds"], row["measured_seconds"]
        counted, expected = sum(row["counted_bytes"].values()), sum(row["predicted_bytes"].values())
        print(
            f"{row['world']:5}{row['ep']:4}{parts['compute']:9.3f}{parts['optimizer']:7.3f}{parts['dispatch']:10.3f}"
            f"{parts['reduce']:8.3f}{predicted:13.3f}{measured:12.3f}{predicted / measured - 1:8.0%}"
            f"{counted / 1e6:9.3f}{expected / 1e6:14.3f}",
            flush=True,
        )
    return rows


def parse_arguments() -> argparse.Namespace:
    """Every number of the hardware profile has an option of its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", nargs="?", default="jobs/configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--check", action="store_true", help="predict and measure steps on this machine")
    parser.add_argument("--rounds", type=int, default=7, help="measured steps of the check")
    parser.add_argument("--hardware", choices=PROFILES, default="h100")
    for field in dataclasses.fields(Hardware):
        kind = int if field.name == "ranks_per_node" else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind)
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--node-mtbf-hours", type=float, nargs="+", default=[LLAMA3_NODE_HOURS, 5e4])
    parser.add_argument("--detect-seconds", type=float, help="default: parallel.timeout_seconds")
    parser.add_argument("--restart-seconds", type=float, default=120.0)
    parser.add_argument("--replace-seconds", type=float, default=1800.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def predict_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A table for each rate of failures."""
    config = load_config(arguments.config, arguments.overrides)
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(Hardware)}
    changes = {name: value for name, value in given.items() if value is not None}
    hardware = dataclasses.replace(PROFILES[arguments.hardware], **changes)
    detect = arguments.detect_seconds
    detect = config.parallel.timeout_seconds if detect is None else detect
    rows = []
    for hours in arguments.node_mtbf_hours:
        faults = Faults(hours, detect, arguments.restart_seconds, arguments.replace_seconds)
        plans = [plan_for(config, world, arguments.accumulation) for world in WORLDS]
        table = [predict(plan, hardware, faults, config.checkpoint.overlap_steps > 0) for plan in plans]
        print(f"\none failure in {hours:,.0f} node hours")
        print_predictions(table)
        rows += [row | {"node_mtbf_hours": hours} for row in table]
    return rows


def main() -> None:
    """Print the tables and write the JSON file."""
    arguments = parse_arguments()
    rows = run_check(arguments.rounds) if arguments.check else predict_all(arguments)
    name = "scaling_check.json" if arguments.check else "scaling_model.json"
    path = arguments.json or Path(__file__).parent / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    environment = {"torch": torch.__version__, "machine": platform.machine()}
    path.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
