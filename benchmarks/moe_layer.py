"""Throughput of the MoE layer against transformers' Mixtral block and against the matrix multiplications alone.

Run `python benchmarks/moe_layer.py`. Each case times five things in turn, round after round, so that other load
on the machine hits all alike; `best` is the fastest round and `median` the middle one.

- dense: one 2048 x 2048 x 2048 multiplication, the ceiling of the machine.
- grouped: the multiplications of this very layer, one `torch.mm` an expert with a real batch's counts, all memory
  allocated and all kernels compiled before: the ceiling of any layer built on GEMMs of these shapes.
- ours, transformers: the layers, router included, on the same inputs and weights. Forward runs without autograd;
  forward+backward yields the gradients of the input and of all weights.

FLOPs are those of the experts, 2 * 3 * N * D * F forward and three times that with backward; the router is not
counted. dtype `autocast` is float32 weights under bfloat16 autocast, the way the trainer runs.

Settings, each in a process of its own: memory `default` or `kept` (`moe_ray.cpu.keep_freed_memory`); batches
`repeated` (the same in every round) or `fresh` (a new one, as in training, so that the experts' counts change).

Shapes: B batch (1), T tokens, D model dim, E experts, K experts a token, F expert hidden dim, N = T * K.
"""

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_ray.config import ModelConfig
from moe_ray.cpu import keep_freed_memory, set_threads
from moe_ray.models.moe import MoE

SHAPES = (
    ModelConfig(num_experts=8, top_k=2, dim=512, expert_dim=1024),
    ModelConfig(num_experts=64, top_k=8, dim=512, expert_dim=128),
)
DTYPES = ("float32", "bfloat16", "autocast")
DENSE_SIZE = 2048
CEILINGS = ("dense", "grouped")
SETTINGS = (("default", "repeated"), ("kept", "repeated"), ("kept", "fresh"))
Run = Callable[[int], Any]


def compute_dtype(dtype: str) -> torch.dtype:
    """The type that the experts multiply in."""
    return torch.float32 if dtype == "float32" else torch.bfloat16


def precision(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """The context in which layers of this dtype run."""
    return torch.autocast("cpu", torch.bfloat16) if dtype == "autocast" else contextlib.nullcontext()


def build_layers(config: ModelConfig, dtype: str) -> tuple[MoE, Any]:
    """Our layer and transformers' with equal weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    hf_config = MixtralConfig(
        hidden_size=config.dim,
        intermediate_size=config.expert_dim,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
    )
    hf_config._experts_implementation = "grouped_mm"
    theirs: Any = MixtralSparseMoeBlock(hf_config)
    ours = MoE(config)
    if dtype == "bfloat16":
        ours, theirs = ours.to(torch.bfloat16), theirs.to(torch.bfloat16)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(0.0, 0.02)
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(ours.experts.w_in_eGD)
        theirs.experts.down_proj.copy_(ours.experts.w_out_eDF)
    return ours, theirs


def check_equal(ours: MoE, theirs: Any, x_BTD: Tensor, dtype: str) -> float:
    """Assert equal outputs wherever both choose the same experts; returns that share of the tokens.

    transformers computes router logits in the input's type, so in bfloat16 near ties go another way.
    """
    with torch.no_grad(), precision(dtype):
        y_BTD, routing = ours(x_BTD, token_ids(x_BTD))
        expected_BTD = theirs(x_BTD)
        _, _, expected_ids_TK = theirs.gate(x_BTD)
    same_T = (routing.expert_ids_TK.sort(dim=-1).values == expected_ids_TK.sort(dim=-1).values).all(dim=-1)
    y_TD, expected_TD = y_BTD[0, same_T].float(), expected_BTD[0, same_T].float()
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    worst = ((y_TD - expected_TD).abs().max() / expected_TD.abs().max()).item()
    share = same_T.float().mean().item()
    assert worst < tolerance, f"outputs differ by {worst:.1e} of the largest"
    assert share > (0.999 if dtype == "float32" else 0.8), f"only {share:.1%} of the tokens agree"
    return share


def token_ids(x_BTD: Tensor) -> Tensor:
    """Ids that the router does not look at."""
    return torch.zeros(x_BTD.shape[:2], dtype=torch.int64)


def make_batches(config: ModelConfig, dtype: str, num_tokens: int, count: int) -> list[Tensor]:
    """Inputs whose tokens share a direction, another one in each batch, so that some experts are in demand."""
    batches = []
    for _ in range(count):
        x_BTD = torch.randn(1, num_tokens, config.dim) + 0.3 * torch.randn(config.dim)
        batches.append((x_BTD.to(torch.bfloat16) if dtype == "bfloat16" else x_BTD).requires_grad_())
    return batches


def layer_runs(layer: nn.Module, batches: list[Tensor], dtype: str) -> tuple[Run, Run]:
    """Forward, and forward with backward."""
    grad_BTD = torch.randn_like(batches[0])
    parameters = list(layer.parameters())

    def forward(index: int) -> Tensor:
        with precision(dtype):
            x_BTD = batches[index % len(batches)]
            out = layer(x_BTD, token_ids(x_BTD)) if isinstance(layer, MoE) else layer(x_BTD)
        return out[0] if isinstance(out, tuple) else out

    def forward_backward(index: int) -> None:
        y_BTD = forward(index)
        inputs = [batches[index % len(batches)], *parameters]
        torch.autograd.grad(y_BTD, inputs, grad_BTD.to(y_BTD.dtype))

    return torch.no_grad()(forward), forward_backward


def grouped_runs(config: ModelConfig, tokens_per_expert: list[int], dtype: torch.dtype) -> tuple[Run, Run]:
    """The GEMMs of forward, and of forward with backward, on memory that is allocated once."""
    num_rows, dim, hidden = sum(tokens_per_expert), config.dim, config.expert_dim

    def rows(width: int) -> tuple[Tensor, ...]:
        return torch.randn(num_rows, width, dtype=dtype).split(tokens_per_expert)

    def weights(*shape: int) -> tuple[Tensor, ...]:
        return torch.randn(config.num_experts, *shape, dtype=dtype).unbind()

    x, y, grad_x, grad_y = (rows(dim) for _ in range(4))
    h, grad_h = (rows(2 * hidden) for _ in range(2))
    a, grad_a = (rows(hidden) for _ in range(2))
    w_in, grad_w_in = (weights(2 * hidden, dim) for _ in range(2))
    w_out, grad_w_out = (weights(dim, hidden) for _ in range(2))
    experts = range(config.num_experts)
    forward_gemms = [
        *((x[e], w_in[e].t(), h[e]) for e in experts),
        *((a[e], w_out[e].t(), y[e]) for e in experts),
    ]
    backward_gemms = [
        *((grad_y[e], w_out[e], grad_a[e]) for e in experts),
        *((grad_y[e].t(), a[e], grad_w_out[e]) for e in experts),
        *((grad_h[e].t(), x[e], grad_w_in[e]) for e in experts),
        *((grad_h[e], w_in[e], grad_x[e]) for e in experts),
    ]

    def run(gemms: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        for left, right, out in gemms:
            torch.mm(left, right, out=out)

    return lambda _: run(forward_gemms), lambda _: run([*forward_gemms, *backward_gemms])


def dense_run(dtype: torch.dtype) -> Run:
    """One large GEMM."""
    left, right, out = (torch.randn(DENSE_SIZE, DENSE_SIZE, dtype=dtype) for _ in range(3))
    return lambda _: torch.mm(left, right, out=out)


def time_interleaved(runs: dict[str, Run], warmup: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round after the warm-up; within a round all run in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(warmup + rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run(index)
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(config: ModelConfig, dtype: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for forward and one for forward+backward, GFLOP/s of each contestant."""
    torch.manual_seed(0)
    num_tokens = arguments.tokens
    warmup = 20 if arguments.batches == "fresh" else 2
    count = warmup + arguments.rounds if arguments.batches == "fresh" else 1
    ours, theirs = build_layers(config, dtype)
    batches = make_batches(config, dtype, num_tokens, count)
    agreement = check_equal(ours, theirs, batches[0], dtype)
    tokens_per_expert = ours(batches[0], token_ids(batches[0]))[1].tokens_per_expert().tolist()
    runs: dict[str, Run] = {"dense": dense_run(compute_dtype(dtype))}
    pairs = {
        "grouped": grouped_runs(config, tokens_per_expert, compute_dtype(dtype)),
        "ours": layer_runs(ours, batches, dtype),
        "transformers": layer_runs(theirs, batches, dtype),
    }
    passes = ("forward", "forward+backward")
    for index, name in enumerate(passes):
        runs |= {f"{contestant} {name}": pair[index] for contestant, pair in pairs.items()}
    seconds = time_interleaved(runs, warmup, arguments.rounds)

    forward_flops = 2 * 3 * num_tokens * config.top_k * config.dim * config.expert_dim
    results = []
    for index, name in enumerate(passes):
        flops = forward_flops * (1, 3)[index]
        work = {"dense": (2 * DENSE_SIZE**3, "dense")} | {c: (flops, f"{c} {name}") for c in pairs}
        results.append(
            {
                "memory": arguments.memory,
                "batches": arguments.batches,
                "experts": config.num_experts,
                "top_k": config.top_k,
                "dim": config.dim,
                "expert_dim": config.expert_dim,
                "tokens": num_tokens,
                "dtype": dtype,
                "pass": name,
                "tokens_per_expert": [min(tokens_per_expert), max(tokens_per_expert)],
                "same_experts_chosen": agreement,
                "best_gflops": {c: f / min(seconds[key]) / 1e9 for c, (f, key) in work.items()},
                "median_gflops": {c: f / statistics.median(seconds[key]) / 1e9 for c, (f, key) in work.items()},
            }
        )
    return results


def run_apart(memory: str, batches: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """`main` with one setting in a fresh process, since neither memory nor compiled kernels can be taken back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, __file__, "--memory", memory, "--batches", batches, "--json", str(path)]
        command += ["--tokens", str(arguments.tokens), "--rounds", str(arguments.rounds)]
        command += ["--threads", str(arguments.threads), "--dtypes", *arguments.dtypes]
        subprocess.run(command, check=True)
        return json.loads(path.read_text())["rows"]


def print_row(row: dict[str, Any]) -> None:
    """GFLOP/s of the best round, the median in brackets, and the best in percent of both ceilings."""
    best, median = row["best_gflops"], row["median_gflops"]
    shape = f"{row['experts']} top-{row['top_k']} F={row['expert_dim']}"
    cells = [f"{shape:15} {row['dtype']:8} {row['pass']:16}", *(f"{best[name]:7.0f}" for name in CEILINGS)]
    for name in ("ours", "transformers"):
        shares = "".join(f"{best[name] / best[ceiling]:6.0%}" for ceiling in CEILINGS)
        cells.append(f"{best[name]:7.0f} ({median[name]:3.0f}){shares}")
    cells.append(f"{best['ours'] / best['transformers']:6.2f}x")
    print(" ".join(cells), flush=True)


def main() -> None:
    """Measure all cases and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--memory", choices=("default", "kept"), help="only this one, with --batches")
    parser.add_argument("--batches", choices=("repeated", "fresh"), default="repeated")
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "moe_layer.json")
    arguments = parser.parse_args()

    if arguments.memory is None:
        rows = [row for setting in SETTINGS for row in run_apart(*setting, arguments)]
    else:
        if arguments.memory == "kept":
            keep_freed_memory()
        set_threads(arguments.threads)
        print(
            f"\nmemory {arguments.memory}, batches {arguments.batches}, GFLOP/s: best (median) % dense % grouped"
        )
        print(f"{'':42}  dense grouped {'ours':>10} {'transformers':>28}")
        rows = []
        for config in SHAPES:
            for dtype in arguments.dtypes:
                for row in measure(config, dtype, arguments):
                    rows.append(row)
                    print_row(row)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    environment = {"torch": torch.__version__, "threads": arguments.threads, "machine": platform.machine()}
    arguments.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")
    if arguments.memory is None:
        print(f"\nwrote {arguments.json}")


if __name__ == "__main__":
    main()
