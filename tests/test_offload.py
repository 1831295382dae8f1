"""Experts that are read from disk when they are needed: same answers, bounded memory, clean errors."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.export import main as export
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.config import ModelConfig, build_config
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.models.hf.save import save_folder
from moe_ray.models.transformer import build_model
from moe_ray.offload.expert_file import ExpertFile, write_experts
from moe_ray.offload.predictor import Predictor
from moe_ray.offload.record import Field, Record
from moe_ray.offload.resident import ResidentExperts
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.build_engine import build_engine
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.load_to_serve import load_to_serve
from moe_ray.serving.metrics import Metrics
from tests.engines import make_request
from tests.hf_folders import CASES, make_folder
from tests.tiny import copy_corpus, run, tiny_settings

pytestmark = pytest.mark.usefixtures("one_thread")

LINES = ["the cat sat on the mat and saw the other cat"] * 5
NUM_LAYERS, NUM_EXPERTS, DIM, EXPERT_DIM = 4, 8, 64, 96


def make_model_folder(root, **fields):
    tokenizer = train_tokenizer(LINES, 300)
    config = {
        "preset": "mixtral",
        "vocab_size": tokenizer.vocab_size,
        "dim": DIM,
        "num_layers": NUM_LAYERS,
        "num_heads": 2,
        "num_kv_heads": 1,
        "num_experts": NUM_EXPERTS,
        "expert_dim": EXPERT_DIM,
        "max_sequence_length": 64,
        "init_std": 0.1,
    }
    tokenizer.save(root / "tokenizer.json")
    content = (root / "tokenizer.json").read_bytes()
    model = build_model(ModelConfig(**config | fields), seed=0)
    save_folder(model, root / "model", tokenizer_json=content, sidecars={})
    return root / "model"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture
def packs(tmp_path):
    return tmp_path / "packs"


def settings(packs, budget=None, **fields):
    fields = {"max_batch_size": 4, "kv_cache_bytes": 1_000_000, "expert_memory_bytes": budget, **fields}
    return ServeConfig(weights_folder=str(packs), **fields)


def record_bytes(source, packs, **fields):
    """Bytes of an expert; the files are made for it."""
    loaded = load_to_serve(source, settings(packs, 2**30, **fields))
    return next(loaded.model.moe_modules()).experts.record.num_bytes


def expert_files(packs):
    return sorted(packs.glob("*.experts"))


def generate(engine, count=4):
    """Tokens and their log-probabilities of some requests that run together."""
    found = {str(i): [] for i in range(count)}
    for name in found:
        prompt = range(3 + int(name), 20 + int(name))
        engine.submit(make_request(name, prompt, max_tokens=15, logprobs=2, ignore_eos=True))
    while engine.has_work:
        for chunk in engine.step():
            found[chunk.request_id] += [(logprob.token_id, logprob.logprob) for logprob in chunk.logprobs]
    return found


@torch.inference_mode()
def logits(loaded):
    return loaded.model.logits(loaded.model(torch.arange(24)[None]).hidden_BSD)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_are_those_of_a_model_in_memory(source, packs, dtype, quantize, prefetch):
    fields = {"dtype": dtype, "quantize": quantize}
    config = settings(packs, **fields, runner="native")
    expected = generate(build_engine(load_to_serve(source, config), config, 64))
    size = record_bytes(source, packs, **fields)
    budget = 10 * size + size // 2
    config = settings(packs, budget, **fields, expert_prefetch=prefetch, runner="native")
    engine = build_engine(load_to_serve(source, config), config, 64)
    # To the last bit.
    assert generate(engine) == expected
    stats = engine.stats()
    # Guesses that are taken back leave slots empty for a while.
    assert 5 * size < stats.expert_bytes_held <= 10 * size
    assert stats.expert_hits > 0
    assert stats.expert_misses > NUM_LAYERS * NUM_EXPERTS / 2
    reads = stats.expert_misses + stats.expert_prefetched
    assert stats.expert_bytes_read == reads * size
    assert (stats.expert_prefetch_hits > 0) == prefetch
    assert stats.expert_prefetch_hits <= stats.expert_prefetched


@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_torch_computes_offloaded_experts_too(source, packs, quantize):
    fields = {"quantize": quantize, "runner": "torch"}
    config = settings(packs, **fields)
    expected = generate(build_engine(load_to_serve(source, config), config, 64))
    config = settings(packs, 9 * record_bytes(source, packs, quantize=quantize), **fields)
    found = generate(build_engine(load_to_serve(source, config), config, 64))
    for name, pairs in expected.items():
        assert [token for token, _ in found[name]] == [token for token, _ in pairs]
        # Where the memory of a small matrix begins decides how its sums are rounded.
        assert [p for _, p in found[name]] == pytest.approx([p for _, p in pairs], abs=1e-4)


@pytest.mark.parametrize("case", ["olmoe, biases, clipped", "deepseek_v3, yarn", "gpt_oss"])
def test_all_architectures_can_be_offloaded(case, tmp_path, packs):
    folder = make_folder(tmp_path / "model", *CASES[case])
    expected = logits(load_for_inference(folder))
    for _ in ("made", "found"):
        loaded = load_to_serve(folder, settings(packs, 2**30))
        torch.testing.assert_close(logits(loaded), expected)
    assert len(expert_files(packs)) == 1


def test_a_checkpoint_of_a_run_is_offloaded_expert_by_expert(tmp_path, packs):
    config = build_config(
        tiny_settings(copy_corpus(tmp_path), tmp_path / "runs", "tiny"), ["parallel.workers=2", "parallel.ep=2"]
    )
    run(config)
    expected = logits(load_for_inference(config.train.run_dir, "bfloat16"))
    loaded = load_to_serve(config.train.run_dir, settings(packs, 2**30, dtype="bfloat16"))
    assert torch.equal(logits(loaded), expected)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="nothing says how much memory is private")
def test_a_model_larger_than_memory_is_loaded_and_served(tmp_path, packs):
    folder = make_model_folder(tmp_path, dim=128, num_layers=10, num_experts=16, expert_dim=1024)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    budget = size // 6
    program = f"""
import re, sys, threading
from pathlib import Path
from tests.test_offload import build_engine, generate, load_to_serve, settings, torch

def private():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def watch():
    while not ended.wait(0.005):
        seen.append(private())

torch.set_num_threads(1)
config = settings({str(packs)!r}, {budget} if sys.argv[1] == "offloaded" else None)
ended, seen, before = threading.Event(), [private()], private()
watcher = threading.Thread(target=watch)
watcher.start()
engine = build_engine(load_to_serve({str(folder)!r}, config), config, 64)
texts = generate(engine, 2)
ended.set()
watcher.join()
print(max(seen) - before, engine.stats().expert_bytes_held)
"""

    def serve(how):
        command = [sys.executable, "-c", program, how]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env=environment, cwd=Path(__file__).parents[1], check=True
        )
        return map(int, done.stdout.split())

    grown, held = serve("offloaded")
    assert budget / 2 < held <= budget
    # What is measured is what a model in memory needs to be loaded.
    (whole, _) = serve("whole")
    assert whole > size > 250_000_000
    assert grown < size / 2


@pytest.mark.parametrize("damage", ["truncated", "a bit"])
def test_a_file_that_is_damaged_while_it_is_used_is_an_error_and_made_anew(source, packs, damage):
    budget = 9 * record_bytes(source, packs)
    (path,) = expert_files(packs)
    expected = logits(load_to_serve(source, settings(packs, budget)))
    config = settings(packs, budget, runner="native")
    engine = build_engine(load_to_serve(source, config), config, 64)
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 3)
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2 + 100] ^= 1
        # The same file, as a disk would do it.
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"experts.*damaged.*start the replica again"):
        generate(engine)
    assert not path.exists()
    assert torch.equal(logits(load_to_serve(source, settings(packs, budget))), expected)
    assert expert_files(packs) == [path]


def test_a_replica_goes_on_when_its_file_loses_its_name(source, packs):
    config = settings(packs, 9 * record_bytes(source, packs), runner="native")
    expected = generate(build_engine(load_to_serve(source, config), config, 64))
    engine = build_engine(load_to_serve(source, config), config, 64)
    for path in packs.iterdir():
        path.unlink()
    assert generate(engine) == expected


def test_a_file_of_another_size_is_made_anew_at_the_start(source, packs, caplog):
    expected = logits(load_to_serve(source, settings(packs, 2**30)))
    (path,) = expert_files(packs)
    os.truncate(path, 4096)
    assert torch.equal(logits(load_to_serve(source, settings(packs, 2**30))), expected)
    assert "experts are damaged" in caplog.text


def test_experts_go_with_their_pack(source, packs, tmp_path):
    load_to_serve(source, settings(packs, 2**30))
    (path,) = expert_files(packs)
    (pack,) = packs.glob("*.safetensors")
    os.utime(pack, (0, 0))
    load_to_serve(source, settings(packs, 2**30, dtype="bfloat16"))
    assert len(expert_files(packs)) == 1
    assert not path.exists()


def test_memory_and_file_are_given_back_with_the_model(source, packs):
    config = settings(packs, 9 * record_bytes(source, packs), runner="native")
    service = CompletionService(load_to_serve(source, config), config)
    resident = weakref.ref(next(service._model.moe_modules()).experts.resident)
    assert resident() is not None
    service.close()
    del service
    gc.collect()
    assert resident() is None
    open_files = (os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))
    assert not [name for name in open_files if str(packs) in name]


def test_what_cannot_be_offloaded_is_refused(source, packs, tmp_path):
    with pytest.raises(
        ConfigError, match=r"serve\.expert_memory_bytes=5000 does not hold the 8 experts.*at least \d+"
    ):
        load_to_serve(source, settings(packs, 5000))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be offloaded to.*serve\.weights_folder"):
        load_to_serve(source, settings(tmp_path / "file", 2**30))
    open_folder = tmp_path / "open"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"others can write.*serve\.weights_folder"):
        load_to_serve(source, settings(open_folder, 2**30))
    with pytest.raises(ConfigError, match=r"serve\.expert_memory_bytes=9 needs a CPU"):
        settings("", 9)
    with pytest.raises(ConfigError, match=r"serve\.expert_prefetch=true has no meaning"):
        settings(packs, expert_prefetch=True)


def test_without_room_for_the_file_the_start_says_how_much_is_needed(source, small_disk):
    folder = small_disk / "packs"
    with pytest.raises(ConfigError, match=r"cannot be offloaded.*No space left.*with room for \d+ bytes"):
        load_to_serve(source, settings(folder, 2**30))
    assert not expert_files(folder)


def test_metrics_name_what_experts_do(source, packs):
    config = settings(packs, 9 * record_bytes(source, packs), runner="native")
    engine = build_engine(load_to_serve(source, config), config, 64)
    generate(engine)
    metrics = Metrics("r")
    metrics.watch(engine.stats)
    text = metrics.text().decode()
    assert f'moe_serve_expert_hits_total{{replica="r"}} {float(engine.stats().expert_hits)}' in text
    assert "# TYPE moe_serve_expert_bytes_held gauge" in text
    assert "moe_serve_expert_wait_seconds_total" in text


class TestResidentExperts:
    RECORD = Record((Field("w", (1024,), torch.float32, 0),), 4096)

    def make(self, tmp_path, num_slots, num_layers=3, num_experts=4, prefetch=False):
        """Expert e of layer l is filled with the number l * E + e."""
        experts = ({"w": torch.full((1024,), float(i))} for i in range(num_layers * num_experts))
        checksums = write_experts(tmp_path / "x.experts", self.RECORD, experts)
        file = ExpertFile(tmp_path / "x.experts", 4096, checksums)
        return ResidentExperts(file, self.RECORD, num_layers, num_experts, 4096 * num_slots, prefetch)

    def check(self, resident, layer, *experts):
        views = resident.acquire(layer, np.array([experts], dtype=np.int32))
        assert {expert: float(view["w"].mean()) for expert, view in views.items()} == {
            expert: float(layer * 4 + expert) for expert in experts
        }

    def test_what_is_used_least_is_given_up(self, tmp_path):
        resident = self.make(tmp_path, num_slots=4, num_layers=2)
        for step in range(10):
            # Expert 0 of each layer always, and another in turn: the least recently used would be 0 itself.
            for layer in range(2):
                self.check(resident, layer, 0, 1 + step % 3)
        stats = resident.stats()
        assert stats.expert_hits == 2 * 9
        assert stats.expert_misses == 2 * 11
        assert stats.expert_bytes_held == 4 * 4096

    def test_what_is_no_longer_used_is_given_up(self, tmp_path):
        resident = self.make(tmp_path, num_slots=4, num_layers=2)
        for _ in range(100):
            self.check(resident, 0, 0, 1, 2, 3)
        for _ in range(200):
            self.check(resident, 1, 0, 1)
            self.check(resident, 0, 0)
        misses = resident.stats().expert_misses
        self.check(resident, 1, 0, 1)
        assert resident.stats().expert_misses == misses

    @pytest.mark.parametrize("prefetch", [False, True])
    def test_any_order_gives_the_right_experts(self, tmp_path, prefetch):
        resident, rng = self.make(tmp_path, num_slots=5, prefetch=prefetch), np.random.default_rng(0)
        for step in range(600):
            count = rng.integers(1, 5)
            self.check(resident, step % 3, *map(int, rng.choice(4, count, replace=False)))
            assert resident.stats().expert_bytes_held <= 5 * 4096

    def test_what_always_follows_is_read_ahead(self, tmp_path):
        resident = self.make(tmp_path, num_slots=4, prefetch=True)
        for step in range(40):
            for layer in range(3):
                self.check(resident, layer, (step + layer) % 4)
        stats = resident.stats()
        # The first layer of a step follows nothing.
        assert stats.expert_prefetch_hits == stats.expert_prefetched >= 70
        assert stats.expert_misses <= 50

    def test_no_expert_is_none(self, tmp_path):
        resident = self.make(tmp_path, num_slots=4, prefetch=True)
        views = resident.acquire(0, np.array([[1, 4], [4, 4]]))
        assert set(views) == {1}


class TestPredictor:
    def test_likelihood_is_the_share_of_what_followed(self):
        predictor = Predictor(2, 4)
        for after, count in ((0, 3), (2, 1)):
            for _ in range(count):
                predictor.learn(0, np.array([[1]]), np.array([[after]]))
        np.testing.assert_allclose(predictor.likelihood(0, np.array([[1]])), [0.75, 0, 0.25, 0])
        # Of two tokens, that either chooses it; of one that was never seen, nothing is known.
        np.testing.assert_allclose(predictor.likelihood(0, np.array([[1], [1]])), [1 - 0.25**2, 0, 1 - 0.75**2, 0])
        np.testing.assert_allclose(predictor.likelihood(0, np.array([[3]])), [0, 0, 0, 0])

    def test_old_habits_are_forgotten(self):
        predictor = Predictor(2, 4)
        for after in (0, 2):
            predictor.learn(0, np.array([[1]] * 2000), np.array([[after]] * 2000))
        for _ in range(20):
            predictor.learn(0, np.array([[1]] * 100), np.array([[2]] * 100))
        likelihood = predictor.likelihood(0, np.array([[1]]))
        assert likelihood[2] > 0.9 > 0.1 > likelihood[0]


def test_what_would_stop_each_replica_is_told_before_there_are_any(source, packs, tmp_path):
    from serve_apps.moe_lm import build

    def ask(folder, **fields):
        args = {"checkpoint": str(folder), "serve.weights_folder": str(packs)}
        build(args | {f"serve.{name}": str(value) for name, value in fields.items()})

    with pytest.raises(ConfigError, match=f"does not hold the {NUM_EXPERTS} experts of a layer"):
        ask(source, expert_memory_bytes=1000)
    export(str(source), str(tmp_path / "int8"), ["quantize=int8"])
    with pytest.raises(ConfigError, match="are not quantized yet"):
        ask(tmp_path / "int8", expert_memory_bytes=2**30)
    assert not packs.exists()
