"""Runs that start from a Hugging Face folder: fine-tuned as it is, or upcycled from a dense model."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from jobs.evaluate import main as evaluate
from jobs.export import main as export
from moe_ray.checkpoint.catalog import list_checkpoints, read_manifest
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.config import Config, build_config
from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.models.hf.resolve import resolve_model
from moe_ray.models.hf.save import save_folder
from moe_ray.models.hf.upcycle import load_start
from moe_ray.models.transformer import Transformer, build_model
from moe_ray.parallel.mesh import build_mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.telemetry.clock import PhaseClock
from moe_ray.training.resume import check_settings
from tests import tiny
from tests.hf_folders import CASES, DENSE_CASES, load_reference, make_folder
from tests.tiny import copy_corpus
from tests.worlds import run_world

PROMPT = torch.arange(1, 33)[None]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("hf") / "mixtral", *CASES["mixtral, tied, window, yarn"])
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("hf") / "llama", *DENSE_CASES["llama"])


@pytest.fixture
def settings(corpus: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(model: dict[str, Any], *overrides: str) -> Config:
        tree = {
            "model": model,
            "data": {
                "sources": [f"code={corpus}/*.txt"],
                "sequence_length": 32,
                "validation_fraction": 0.2,
                "path": str(tmp_path / "prepared"),
            },
            "optim": {"lr": 1e-2, "warmup_steps": 0},
            "train": {"storage": str(tmp_path), "steps": 4, "global_batch": 4, "micro_batch": 2, "log_every": 1},
            "checkpoint": {"every": 2},
        }
        return build_config(tree, overrides)

    return make


def run(config: Config) -> list[dict[str, Any]]:
    """Train as the launcher would; returns the logged metrics."""
    return tiny.run(resolve_model(config))


@torch.inference_mode()
def our_logits(model: Transformer) -> Tensor:
    return model.logits(model(PROMPT).hidden_BSD)


@torch.inference_mode()
def their_logits(folder: Path) -> Tensor:
    return load_reference(folder)(PROMPT).logits


class TestResolve:
    def test_the_folder_decides_the_architecture(self, mixtral: Path, settings: Callable[..., Config]) -> None:
        config = resolve_model(settings({"init_from": str(mixtral), "capacity_factor": 2.0}))
        assert config.model.preset == "mixtral"
        assert (config.model.dim, config.model.num_experts, config.model.sliding_window) == (32, 4, 5)
        assert config.model.max_sequence_length == 64
        assert config.model.load_balancing_loss_weight == 0.02
        assert config.model.capacity_factor == 2.0
        assert config.data.tokenizer == str(mixtral / "tokenizer.json")
        assert resolve_model(config) == config

    def test_without_a_folder_nothing_changes(self, settings: Callable[..., Config]) -> None:
        config = settings({"dim": 64})
        assert resolve_model(config) is config

    def test_what_is_trained_with_may_differ(self, mixtral: Path, settings: Callable[..., Config]) -> None:
        free = {
            "max_sequence_length": 48,
            "router_jitter": 0.1,
            "load_balancing_loss_weight": 0.5,
            "init_std": 0.3,
        }
        config = resolve_model(settings({"init_from": str(mixtral), "preset": "basic", **free}))
        assert {name: getattr(config.model, name) for name in free} == free
        assert config.model.preset == "basic"

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ({"dim": 64}, r"model\.dim=64 contradicts model\.init_from=.*, which has 32\. Fix: leave it out"),
            ({"preset": "olmoe"}, r"of model\.preset=olmoe contradicts"),
            ({"max_sequence_length": 65}, "max_sequence_length=65 is longer than the 64"),
        ],
    )
    def test_contradictions(
        self, model: dict[str, Any], message: str, mixtral: Path, settings: Callable[..., Config]
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            resolve_model(settings({"init_from": str(mixtral)} | model))

    def test_settings_that_do_not_fit_the_folder(self, mixtral: Path, settings: Callable[..., Config]) -> None:
        for overrides, message in (
            (["data.sequence_length=65"], "sequence_length=65 is longer than model.max_sequence_length=64"),
            (["parallel.workers=3", "parallel.ep=3"], "ep=3 does not divide model.num_experts=4"),
        ):
            config = settings({"init_from": str(mixtral)}, *overrides)
            with pytest.raises(ConfigError, match=message):
                resolve_model(config)

    def test_folders_of_the_wrong_kind(
        self, mixtral: Path, llama: Path, tmp_path: Path, settings: Callable[..., Config]
    ) -> None:
        for model, message in (
            ({"init_from": str(tmp_path / "none")}, "config.json' cannot be read: No such file"),
            ({"init_from": str(llama)}, "model_type='llama'.*use one of mixtral"),
            ({"upcycle_from": str(mixtral)}, "model_type='mixtral'.*use one of llama, qwen3"),
        ):
            with pytest.raises(CheckpointError, match=message):
                resolve_model(settings(model))

    def test_upcycling_leaves_the_experts_to_the_settings(
        self, llama: Path, settings: Callable[..., Config]
    ) -> None:
        model = {"upcycle_from": str(llama), "num_experts": 16, "top_k": 4, "num_dense_layers": 1, "moe_every": 2}
        config = resolve_model(settings(model)).model
        assert (config.num_experts, config.top_k, list(config.moe_layers)) == (16, 4, [2])
        assert (config.expert_dim, config.dense_dim, config.num_layers) == (48, 48, 4)
        for field, value in (("expert_dim", 64), ("num_shared_experts", 1), ("attention", "mla")):
            with pytest.raises(ConfigError, match=rf"model\.{field}=.* contradicts model\.upcycle_from"):
                resolve_model(settings(model | {field: value} | ({"num_kv_heads": 4} if value == "mla" else {})))


class TestFineTuning:
    @pytest.mark.parametrize("ep", [1, 2])
    def test_starts_from_the_weights(self, ep: int, mixtral: Path, settings: Callable[..., Config]) -> None:
        overrides = ["optim.lr=1e-9", "train.steps=1", f"parallel.workers={ep}", f"parallel.ep={ep}"]
        config = settings({"init_from": str(mixtral)}, *overrides)
        run(config)
        logits = our_logits(load_for_inference(config.train.run_dir).model)
        torch.testing.assert_close(logits, their_logits(mixtral), rtol=1e-4, atol=1e-4)

    def test_run_needs_the_folder_only_for_its_settings(
        self, mixtral: Path, tmp_path: Path, settings: Callable[..., Config]
    ) -> None:
        folder = Path(shutil.copytree(mixtral, tmp_path / "start"))
        config = settings({"init_from": str(folder)}, "train.steps=2")
        run(config)
        manifest = read_manifest(list_checkpoints(config.train.run_dir)[-1])
        kept = {entry.name for entry in manifest.files if entry.kind == "sidecar"}
        assert kept == {"tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
        # The weights are not read again, and where the folder is does not matter.
        (folder / "model.safetensors").unlink()
        folder.rename(tmp_path / "moved")
        longer = settings({"init_from": str(tmp_path / "moved"), "init_std": 0.5})
        check_settings(manifest, resolve_model(longer))
        assert len(run(longer)) == 4
        shutil.rmtree(tmp_path / "moved")
        export(str(config.train.run_dir), str(tmp_path / "out"), [])
        assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
        logits = our_logits(load_for_inference(config.train.run_dir).model)
        torch.testing.assert_close(their_logits(tmp_path / "out"), logits, rtol=1e-4, atol=1e-4)

    def test_it_learns(self, mixtral: Path, settings: Callable[..., Config]) -> None:
        metrics = run(settings({"init_from": str(mixtral)}, "train.steps=40", "train.eval_every=20"))
        assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.5


class TestExportOfARun:
    def test_transformers_loads_model_and_tokenizer(self, tmp_path: Path, settings: Callable[..., Config]) -> None:
        model = {"vocab_size": 400, "dim": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "init_std": 0.2}
        config = settings(model, "train.name=own", "model.expert_dim=16", "model.max_sequence_length=64")
        run(config)
        export(str(config.train.run_dir), str(tmp_path / "out"), [])
        loaded = load_for_inference(config.train.run_dir)
        torch.testing.assert_close(their_logits(tmp_path / "out"), our_logits(loaded.model), rtol=1e-4, atol=1e-4)
        theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
        text = "def naïve(x):\n    return  x + 1  # 東京 🙂\n"
        assert theirs(text)["input_ids"] == loaded.tokenizer.encode(text)
        assert theirs.decode(theirs(text)["input_ids"]) == text
        assert theirs.eos_token_id == theirs.pad_token_id == loaded.tokenizer.eos_id
        assert theirs.model_max_length == 64
        reference = load_reference(tmp_path / "out")
        assert reference.generation_config.eos_token_id == loaded.tokenizer.eos_id
        assert reference.config.eos_token_id == loaded.tokenizer.eos_id

    def test_evaluation_of_a_folder(
        self, mixtral: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(ConfigError, match=r"has no run.*set data\.sources"):
            evaluate(str(mixtral), [])
        evaluate(str(mixtral), [f"data.sources=[{corpus}/ast.txt,{corpus}/dis.txt]", f"data.path={tmp_path}/data"])
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["val_perplexity"] > 1


def upcycled(config: Config) -> Transformer:
    """The model at step 0."""
    model = build_model(config.model, config.train.seed)
    load_start(model, config.train.seed)
    return model.eval()


def check_upcycled_share(rank: int, config: Config, expected: Tensor) -> None:
    mesh = build_mesh(2)
    model = build_sharded_model(config.model, config.train.seed, mesh, PhaseClock(mesh.device, enabled=False))
    load_start(model, config.train.seed)
    torch.testing.assert_close(our_logits(model.eval()), expected, rtol=1e-4, atol=1e-4)


class TestUpcycling:
    @pytest.mark.parametrize("case", DENSE_CASES)
    def test_equals_the_dense_model_here_and_exported(
        self, case: str, tmp_path: Path, settings: Callable[..., Config]
    ) -> None:
        dense = make_folder(tmp_path / "dense", *DENSE_CASES[case])
        layers = {"num_dense_layers": 1} if case == "qwen3" else {}
        config = resolve_model(settings({"upcycle_from": str(dense), "num_experts": 4} | layers))
        model = upcycled(config)
        torch.testing.assert_close(our_logits(model), their_logits(dense), rtol=1e-4, atol=1e-4)
        architecture = save_folder(model, tmp_path / "out", tokenizer_json=b"{}", sidecars={})
        assert architecture.name == ("qwen3_moe" if case == "qwen3" else "mixtral")
        torch.testing.assert_close(their_logits(tmp_path / "out"), their_logits(dense), rtol=1e-4, atol=1e-4)

    def test_noise_sets_experts_apart_by_its_measure(self, llama: Path, settings: Callable[..., Config]) -> None:
        model = {"upcycle_from": str(llama), "num_experts": 4}
        plain = upcycled(resolve_model(settings(model))).layers[0].ffn.experts.w_out_eDF
        noisy = upcycled(resolve_model(settings(model | {"upcycle_noise": 0.5}))).layers[0].ffn.experts.w_out_eDF
        for expert in range(4):
            assert torch.equal(plain[expert], plain[0])
            assert ((noisy[expert] - plain[expert]).std() / plain[expert].std()).item() == pytest.approx(
                0.5, rel=0.1
            )
        assert not torch.equal(noisy[0], noisy[1])

    def test_any_ep_starts_from_the_same_model(self, llama: Path, settings: Callable[..., Config]) -> None:
        model = {"upcycle_from": str(llama), "num_experts": 4, "upcycle_noise": 0.5}
        config = resolve_model(settings(model))
        run_world(2, check_upcycled_share, config, our_logits(upcycled(config)))

    def test_trains_and_exports(self, llama: Path, tmp_path: Path, settings: Callable[..., Config]) -> None:
        config = settings({"upcycle_from": str(llama), "num_experts": 4, "upcycle_noise": 0.1}, "train.steps=20")
        metrics = run(config)
        assert metrics[-1]["loss"] < metrics[0]["loss"]
        export(str(config.train.run_dir), str(tmp_path / "out"), [])
        logits = our_logits(load_for_inference(config.train.run_dir).model)
        torch.testing.assert_close(their_logits(tmp_path / "out"), logits, rtol=1e-4, atol=1e-4)

    def test_shapes_that_do_not_fit_are_refused(self, llama: Path, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(llama, tmp_path / "bad"))
        tree = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(tree | {"intermediate_size": 56}))
        config = resolve_model(
            build_config(
                {
                    "model": {"upcycle_from": str(folder), "max_sequence_length": 64},
                    "data": {"sequence_length": 64},
                }
            )
        )
        with pytest.raises(CheckpointError, match=r"mlp\.\w+\.weight of shape"):
            upcycled(config)


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.timeout(600)
def test_the_commands_of_the_page_work(tmp_path: Path) -> None:
    """In a folder with links to the repository, and with a tiny model in place of SmolLM2."""
    root = Path(__file__).resolve().parents[1]
    for name in ("jobs", "tests", "serve_apps"):
        (tmp_path / name).symlink_to(root / name)
    class_name, sizes = DENSE_CASES["llama, tied"]
    make_folder(tmp_path / "runs" / "smollm2", class_name, sizes | {"max_position_embeddings": 512})
    page = (root / "docs" / "huggingface.md").read_text(encoding="utf-8")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    commands = [
        command
        for block in re.findall(r"^```bash\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
        for command in block.splitlines()
        if not command.startswith(("make smollm2", "python -m tests.smollm2", "serve run"))
    ]
    assert [shlex.split(command)[1] for command in commands] == [
        "jobs/train.py",
        "jobs/export.py",
        "jobs/export.py",
        "jobs/train.py",
        "jobs/evaluate.py",
    ]
    (program,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    for command in [*map(shlex.split, commands), ["python", "-c", program]]:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stderr}"
