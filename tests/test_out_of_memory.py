"""A step that runs out of memory says where, on how much, and what to change; the allocations fail for real."""

import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from moe_ray.config import Config, build_config
from moe_ray.data.batches import MicroBatch
from moe_ray.data.prepare import prepare
from moe_ray.errors import OutOfMemoryError, TrainingError
from moe_ray.parallel.mesh import build_mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.training import loop
from moe_ray.training.memory import is_out_of_memory
from moe_ray.training.optimizer import build_optimizer
from moe_ray.training.step import Trainer, train_step
from tests.tiny import copy_corpus, tiny_settings
from tests.worlds import run_world

# Embedding, logits and their gradient are 33 MB and more: each a mapping of its own, which a limit refuses.
MODEL = {"vocab_size": 65536, "dim": 160, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1}
CONFIG = build_config(
    {
        "model": MODEL | {"num_experts": 4, "top_k": 1, "expert_dim": 64},
        "data": {"sequence_length": 64},
        "train": {"global_batch": 4, "micro_batch": 2},
    }
)


def allow_no_more_memory() -> None:
    """The limit holds for this process and is real: mmap fails."""
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + 4_000_000, resource.RLIM_INFINITY))


class LimitingClock(PhaseClock):
    """Takes the memory away when a phase begins."""

    def __init__(self, device: torch.device, limited: str) -> None:
        super().__init__(device)
        self.limited = limited

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        if name == self.limited:
            allow_no_more_memory()
        with super().phase(name):
            yield


def fail_in_phase(rank: int, phase: str) -> None:
    mesh = build_mesh(ep=2)
    clock = LimitingClock(mesh.device, phase)
    model = build_sharded_model(CONFIG.model, 0, mesh, clock)
    for moe in model.moe_modules():
        moe.router.load_fraction_E.copy_(torch.tensor([0.6, 0.3, 0.1, 0.0]))
    trainer = Trainer(CONFIG, mesh, model, build_optimizer(model, CONFIG.optim), clock)
    tokens_BS = torch.randint(MODEL["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(rank))
    batch = MicroBatch(tokens_BS, tokens_BS, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(OutOfMemoryError) as raised:
        train_step(trainer, [batch], 1e-3)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    problem, fix = raised.value.problem, raised.value.fix
    print(raised.value, flush=True)
    assert f"worker {rank} ran out of memory in phase {phase} with micro-batches of 2 sequences x 64 t" in problem
    if phase == "forward":
        # Nothing is routed in this step yet, so it is the imbalance of the last one.
        assert (
            "busiest expert takes 2.40 times the mean of tokens, the busiest rank of an ep group 1.80" in problem
        )
    else:
        assert "2.40 times the mean" not in problem
    order = ["train.micro_batch (now 2)", "parallel.dispatch_buffer_factor (now 2)", "parallel.ep (now 2 of 2"]
    order += ["parallel.shard_dense", "parallel.shard_experts", "data.sequence_length (now 64)"]
    places = [fix.index(setting) for setting in order]
    assert places == sorted(places)


@pytest.mark.parametrize("phase", ["forward", "backward", "optimizer"])
def test_the_error_names_phase_batch_imbalance_and_settings(phase: str) -> None:
    run_world(2, fail_in_phase, phase)


def train_until_memory_ends(_: int, config: Config, data_dir: Path) -> None:
    with pytest.raises(
        OutOfMemoryError, match=r"^step 2: worker 0 ran out of memory in phase \w+ with micro-batches"
    ):
        loop.train(config, build_mesh(1), data_dir, lambda metrics: allow_no_more_memory())


def test_the_loop_keeps_the_type_and_names_the_step(tmp_path: Path) -> None:
    settings = tiny_settings(copy_corpus(tmp_path), tmp_path, "run")
    # Large enough that a step's memory goes back to the system in between: logits of 67 MB.
    settings["data"] |= {"sequence_length": 512}
    settings["model"] |= {"max_sequence_length": 512, "vocab_size": 512}
    settings["train"] |= {"micro_batch": 64, "global_batch": 64, "eval_every": 100}
    config = build_config(settings)
    data_dir = prepare(config)
    config.train.run_dir.mkdir(parents=True, exist_ok=True)
    run_world(1, train_until_memory_ends, config, data_dir)


def test_only_failed_allocations_count() -> None:
    assert issubclass(OutOfMemoryError, TrainingError)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("not enough memory"))
