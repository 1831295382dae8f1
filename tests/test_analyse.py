"""Whole analyses: of runs of any architecture, on a disk and in a bucket, with and without their text."""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from moe_ray.analytics.analyse import Options, analyse
from moe_ray.analytics.analysis import Analysis
from moe_ray.analytics.collect import collect
from moe_ray.checkpoint.attempt import Attempt
from moe_ray.checkpoint.catalog import checkpoint_name
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.checkpoint.manifest import TOKENIZER
from moe_ray.checkpoint.writer import CheckpointWriter, Origin, Outcome
from moe_ray.config import Config, build_config
from moe_ray.data.prepare import prepare
from moe_ray.data.reader import open_data
from moe_ray.errors import CheckpointError
from moe_ray.models.hf.save import save_folder
from moe_ray.models.router import Router
from moe_ray.models.transformer import build_model
from moe_ray.parallel.mesh import build_mesh
from moe_ray.serving.app import make_app
from moe_ray.serving.completions import CompletionService
from moe_ray.storage import open_storage
from moe_ray.training.loop import train
from tests.s3_server import S3Server
from tests.tiny import copy_corpus, tiny_settings

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = Options(max_tokens=1024, permutations=40, pairs=6)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def make_config(corpus: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(*overrides: str, storage: Path | str = tmp_path) -> Config:
        two = f"data.sources=['a={corpus}/[a-c]*.txt', 'b={corpus}/[d-z]*.txt']"
        settings = [two, f"data.path={corpus}/two", "checkpoint.keep_last=9", *overrides]
        return build_config(tiny_settings(corpus, storage, "run"), settings)

    return make


def save_run(config: Config, *steps: int) -> str:
    """Checkpoints of random weights, as a run on the config's data would leave them."""
    data_dir = prepare(config)
    run = open_storage(config.train.run_uri)
    attempt = Attempt(run, "attempt", lambda: True)
    attempt.claim()
    digest = open_data(data_dir, config.data.sequence_length).index.digest
    origin = Origin(config, run, attempt, digest, {TOKENIZER: (data_dir / TOKENIZER).read_bytes()})
    for step in steps:
        model = build_model(config.model, seed=step)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        writer = CheckpointWriter(origin, build_mesh(1), model, optimizer)
        writer.begin(step, {})
        assert writer.finish() is Outcome.SAVED
    return config.train.run_uri


@contextmanager
def raw_counts(*, training: bool = False) -> Iterator[dict[Router, np.ndarray]]:
    """Tokens that chose each expert, by router, straight from what the routers of this process return."""
    counts: dict[Router, Any] = defaultdict(int)

    def look(module: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, Router) and module.training == training:
            ids = output.expert_ids_TK.flatten().numpy()
            counts[module] += np.bincount(ids[ids < output.num_experts], minlength=output.num_experts)

    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        yield counts
    finally:
        handle.remove()


def test_counts_agree_with_the_raw_router_outputs(make_config: Callable[..., Config]) -> None:
    config = make_config("serve.runner=torch", "model.init_std=0.2")
    checkpoint = load_for_inference(save_run(config, 1))
    data = open_data(prepare(config), config.data.sequence_length)
    tokens_NS = np.stack([data.sequence("validation", n)[:-1] for n in range(8)]).astype(np.int64)
    routers = [moe.router for moe in checkpoint.model.moe_modules()]

    service = CompletionService(checkpoint, config.serve)
    try:
        with raw_counts() as counts:
            answer = asyncio.run(ask_routing(service, tokens_NS))
        served = [counts[router] for router in routers]
    finally:
        service.close()
    assert answer["num_experts"] == config.model.num_experts
    answered = [np.zeros(config.model.num_experts, int) for _ in routers]
    for text in answer["data"]:
        for number, layer in enumerate(text["layers"]):
            assert layer["layer"] == config.model.moe_layers[number]
            np.add.at(answered[number], np.array(layer["experts"]).flatten(), 1)
    np.testing.assert_array_equal(answered, served)

    with raw_counts() as counts:
        collected = collect(checkpoint.model, tokens_NS, [])
    raw = [counts[router] for router in routers]
    np.testing.assert_array_equal(collected.sums.tokens_per_expert_LE.numpy(), raw)
    np.testing.assert_array_equal(collected.pairs.together_LEE.diagonal(dim1=1, dim2=2).numpy(), raw)
    np.testing.assert_array_equal(collected.tokens.counts_LCE.sum(dim=1).numpy(), raw)
    # Generation and evaluation route alike.
    np.testing.assert_array_equal(raw, served)


async def ask_routing(service: CompletionService, tokens_NS: np.ndarray) -> dict[str, Any]:
    transport = httpx.ASGITransport(make_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        response = await client.post("/v1/routing", json={"model": "run", "input": tokens_NS.tolist()}, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def test_metrics_of_a_step_agree_with_the_raw_router_outputs(make_config: Callable[..., Config]) -> None:
    config = make_config("train.steps=1", "optim.warmup_steps=0", "train.log_every=1")
    reports: list[dict[str, Any]] = []
    with raw_counts(training=True) as counts:
        train(config, build_mesh(1), prepare(config), reports.append)
    (metrics,) = reports
    tokens = 6 * 32
    raw_LE = np.stack(list(counts.values()))
    assert (raw_LE.sum(axis=1) == tokens * config.model.top_k).all()
    load_LE = raw_LE / raw_LE.sum(axis=1, keepdims=True)
    np.testing.assert_array_equal(metrics["load_by_layer"], load_LE)
    assert metrics["dead_experts_by_layer"] == (raw_LE == 0).sum(axis=1).tolist()
    assert metrics["overloaded_experts_by_layer"] == (load_LE * 4 > 2).sum(axis=1).tolist()
    assert metrics["load_max_over_mean_by_layer"] == pytest.approx((load_LE.max(axis=1) * 4).tolist())


def test_a_run_is_analysed_in_full(make_config: Callable[..., Config]) -> None:
    run = save_run(make_config(), 1, 2, 3, 4)
    seen: list[tuple[str, int, int]] = []
    found = analyse(run, Options(1024, earlier=2, permutations=40, pairs=6), lambda *args: seen.append(args))
    assert Analysis.model_validate_json(found.model_dump_json()) == found
    assert (found.run, found.steps) == ("run", (1, 2, 4))
    assert (found.tokens, found.sequences, found.sequence_length) == (1024, 32, 32)
    assert [layer.layer for layer in found.layers] == [0, 1]
    assert all(sum(layer.tokens_per_expert) == 2048 for layer in found.layers)
    assert [(drift.from_step, drift.to_step) for drift in found.drifts] == [(1, 2), (2, 4)]
    assert all(0 < layer.changed <= 1 for drift in found.drifts for layer in drift.layers)
    assert [kind.kind for kind in found.specialisations] == ["domain", "token_class", "position"]
    assert found.specialisations[0].labels == ("a", "b")
    assert len(found.probes) == 5
    assert found.cost is not None
    assert [missing.question for missing in found.missing] == ["speed"]
    assert seen[-1] == ("routing of step 1", 32, 32)
    assert analyse(run, Options(1024, earlier=2, permutations=40, pairs=6)).layers == found.layers


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.num_experts=1", "model.top_k=1"],
        ["model.router=hash"],
        ["model.router=expert_choice"],
        ["model.router=tests.planted:RepeatRouter", "model.top_k=1"],
        ["model.num_layers=5", "model.num_dense_layers=1", "model.moe_every=2"],
        [
            "model.preset=deepseek_v3",
            "model.num_experts=8",
            "model.num_expert_groups=2",
            "model.num_limited_groups=1",
            "model.num_layers=3",
            "model.num_kv_heads=2",
        ],
        ["model.capacity_factor=1.0", "model.eval_capacity_factor=0.5"],
    ],
    ids=lambda overrides: overrides[0].removeprefix("model."),
)
def test_every_architecture_is_analysed(make_config: Callable[..., Config], overrides: list[str]) -> None:
    config = make_config(*overrides)
    found = analyse(save_run(config, 1, 2), SMALL)
    assert Analysis.model_validate_json(found.model_dump_json()) == found
    assert [layer.layer for layer in found.layers] == list(config.model.moe_layers)
    assert len(found.flows) == len(config.model.moe_layers) - 1
    assert len(found.drifts) == 1
    assert {missing.question for missing in found.missing} == {"speed"}
    if config.model.eval_capacity_factor is not None:
        assert any(layer.dropped_fraction > 0 for layer in found.layers)


def test_what_cannot_be_answered_is_said(make_config: Callable[..., Config], corpus: Path, tmp_path: Path) -> None:
    own = tmp_path / "texts"
    own.mkdir()
    for path in corpus.glob("*.txt"):
        (own / path.name).write_bytes(path.read_bytes())
    one_domain = make_config(f"data.sources=['all={own}/*.txt']", f"data.path={tmp_path}/prepared")
    run = Path(save_run(one_domain, 3))
    reasons = {missing.question: missing.reason for missing in analyse(run, SMALL).missing}
    assert set(reasons) == {"domain", "drift", "speed"}
    assert "one domain" in reasons["domain"]

    (tmp_path / "prepared" / "index.json").unlink()
    without_text = analyse(run, SMALL)
    reasons = {missing.question: missing.reason for missing in without_text.missing}
    assert (without_text.tokens, without_text.layers, without_text.drifts) == (0, (), ())
    assert without_text.probes
    assert without_text.cost is not None
    assert str(tmp_path / "prepared") in reasons["layers"]
    assert "Fix: " in reasons["token_class"]

    prepare(make_config(f"data.sources=['all={own}/[c-z]*.txt']", f"data.path={tmp_path}/prepared"))
    reasons = {missing.question: missing.reason for missing in analyse(run, SMALL).missing}
    assert "not what the run was trained on" in reasons["flow"]

    given = analyse(run, Options(1024, permutations=40, pairs=6, data_dir=prepare(make_config())))
    reasons = {missing.question: missing.reason for missing in given.missing}
    assert "another tokenizer" in reasons["layers"]

    with pytest.raises(CheckpointError):
        analyse(tmp_path / "nothing", SMALL)


def test_a_damaged_checkpoint_is_left_out_and_said(make_config: Callable[..., Config]) -> None:
    config = make_config()
    run = Path(save_run(config, 1, 2, 3))
    weights = next((run / checkpoint_name(2)).glob("model-*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8])
    found = analyse(run, SMALL)
    assert [(drift.from_step, drift.to_step) for drift in found.drifts] == [(1, 3)]
    assert [missing.question for missing in found.missing if "step-00000002" in missing.reason] == ["drift"]


def test_a_folder_without_a_run(make_config: Callable[..., Config], tmp_path: Path) -> None:
    config = make_config("model.preset=mixtral", "model.num_experts=4", "model.expert_dim=64", "model.dim=64")
    checkpoint = load_for_inference(save_run(config, 1))
    folder = tmp_path / "folder"
    tokenizer_json = checkpoint.tokenizer.serialized.encode()
    save_folder(checkpoint.model, folder, tokenizer_json=tokenizer_json, sidecars={})
    found = analyse(folder, SMALL)
    assert {missing.question for missing in found.missing} >= {"layers", "domain", "drift", "speed"}
    given = analyse(folder, Options(1024, permutations=40, pairs=6, data_dir=prepare(config)))
    assert {missing.question for missing in given.missing} == {"drift", "speed"}
    assert given.layers


def test_a_run_in_a_bucket(
    make_config: Callable[..., Config], s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = save_run(make_config(storage=s3.fresh_uri()), 1, 2)
    found = analyse(run, SMALL)
    assert found.steps == (1, 2)
    assert {missing.question for missing in found.missing} == {"speed"}
