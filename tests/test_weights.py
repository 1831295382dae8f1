"""Processes of a node that serve one model share the memory of its weights; quantized ones lose little."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.evaluate import main as evaluate
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.config import ModelConfig, build_config
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.models.hf.save import save_folder
from moe_ray.models.transformer import build_model
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.load_to_serve import load_to_serve
from tests.hf_folders import CASES, make_folder
from tests.tiny import copy_corpus, run, tiny_settings

pytestmark = pytest.mark.usefixtures("one_thread")

LINES = ["the cat sat on the mat and saw the other cat"] * 5
MAPPED = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \S+ +(\S.*)$")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    tokenizer = train_tokenizer(LINES, 300)
    config = ModelConfig(
        preset="mixtral",
        vocab_size=tokenizer.vocab_size,
        dim=128,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        num_experts=4,
        expert_dim=512,
        max_sequence_length=64,
        init_std=0.1,
    )
    root = tmp_path_factory.mktemp("hf")
    tokenizer.save(root / "tokenizer.json")
    folder = root / "model"
    save_folder(
        build_model(config, seed=0), folder, tokenizer_json=(root / "tokenizer.json").read_bytes(), sidecars={}
    )
    return folder


@pytest.fixture
def source(original, tmp_path):
    """A folder that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def packs(tmp_path):
    return tmp_path / "packs"


def settings(packs, **fields):
    return ServeConfig(weights_folder=str(packs), **fields)


def pack_files(packs):
    return sorted(packs.glob("*.safetensors"))


@torch.inference_mode()
def logits(loaded):
    return loaded.model.logits(loaded.model(torch.arange(24)[None]).hidden_BSD)


def mapped_from(packs):
    """Whether this process has a file of the folder in its memory."""
    return str(packs) in Path("/proc/self/maps").read_text()


def kilobytes(pid, packs, field):
    """Sum of a field of smaps over the mappings of packs."""
    total, counts = 0, False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        found = MAPPED.match(line)
        if found or re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            counts = bool(found) and str(packs) in found[1]
        elif counts and line.startswith(f"{field}:"):
            total += int(line.split()[1])
    return total


@contextlib.contextmanager
def replicas(number, source, packs, quantize="none"):
    """Processes that start together, each of which has the model and then waits for the end of its input."""
    program = f"""
import logging, sys
logging.basicConfig(level=logging.INFO)
from tests.test_weights import load_to_serve, logits, settings
loaded = load_to_serve({str(source)!r}, settings({str(packs)!r}, quantize={quantize!r}))
print(float(logits(loaded).abs().sum()), flush=True)
sys.stdin.read()
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        )
        for _ in range(number)
    ]
    try:
        yield [(child.pid, float(child.stdout.readline())) for child in children]
    finally:
        for child in children:
            child.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_processes_that_start_together_pack_once_and_share_pages(source, packs, quantize):
    with replicas(2, source, packs, quantize) as running:
        (path,) = pack_files(packs)
        inode = path.stat().st_ino
        expected = float(logits(load_for_inference(source, quantize=quantize)).abs().sum())
        size = path.stat().st_size / 1024
        for pid, total in running:
            assert total == pytest.approx(expected, rel=1e-5)
            # All of it is there, half of it counts, and nothing was written to.
            assert kilobytes(pid, packs, "Rss") > 0.95 * size
            assert kilobytes(pid, packs, "Pss") < 0.6 * size
            assert kilobytes(pid, packs, "Anonymous") == 0
    assert path.stat().st_ino == inode
    assert packs.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_are_those_of_weights_in_private_memory(source, packs, quantize, dtype):
    expected = logits(load_for_inference(source, dtype, quantize=quantize))
    config = settings(packs, dtype=dtype, quantize=quantize)
    for _ in ("made", "found"):
        loaded = load_to_serve(source, config)
        assert not loaded.model.training
        assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
        assert torch.equal(logits(loaded), expected)
        assert mapped_from(packs)
    del loaded
    assert not mapped_from(packs)
    # The engine takes them as they are.
    service = CompletionService(load_to_serve(source, config), config)
    service.close()


@pytest.mark.parametrize(
    "case", ["olmoe, biases, clipped", "deepseek_v3, yarn", "gpt_oss", "mixtral, tied, window, yarn"]
)
def test_all_tensors_of_an_architecture_are_packed(case, tmp_path, packs):
    folder = make_folder(tmp_path / "model", *CASES[case])
    expected = logits(load_for_inference(folder))
    for _ in ("made", "found"):
        # Where the memory of a small matrix begins decides how its sums are rounded.
        torch.testing.assert_close(logits(load_to_serve(folder, settings(packs))), expected)
    assert len(pack_files(packs)) == 1


@pytest.mark.parametrize(
    "damage", ["truncated", "emptied", "a bit in the middle", "a bit of the header", "other text"]
)
def test_a_damaged_pack_is_made_anew(source, packs, damage, caplog):
    expected = logits(load_to_serve(source, settings(packs)))
    (path,) = pack_files(packs)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[-1000:]
    elif damage == "emptied":
        content.clear()
    elif damage == "a bit in the middle":
        content[len(content) // 2] ^= 1
    elif damage == "a bit of the header":
        content[content.index(b"data_offsets") + 20] ^= 1
    else:
        content[:] = b"not a pack" * 100
    path.write_bytes(content)
    assert torch.equal(logits(load_to_serve(source, settings(packs))), expected)
    assert "damaged" in caplog.text
    assert pack_files(packs) == [path]
    caplog.clear()
    assert torch.equal(logits(load_to_serve(source, settings(packs))), expected)
    assert not caplog.text


def test_a_changed_source_gets_a_new_pack_and_loses_the_old(source, packs):
    first = load_to_serve(source, settings(packs))
    before, old = logits(first), pack_files(packs)
    load_to_serve(source, settings(packs, quantize="int8"))
    assert len(pack_files(packs)) == 2
    weights = next(source.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    # The exponent of a number.
    content[-1] ^= 1
    weights.write_bytes(content)
    second = load_to_serve(source, settings(packs))
    assert not torch.equal(logits(second), before)
    assert torch.equal(logits(second), logits(load_for_inference(source)))
    assert len(pack_files(packs)) == 1
    assert not set(pack_files(packs)) & set(old)
    # Who still has the old one keeps it.
    assert torch.equal(logits(first), before)


def test_what_nobody_needs_is_removed_when_another_is_made(source, tmp_path, packs):
    gone = Path(shutil.copytree(source, tmp_path / "gone"))
    unused = Path(shutil.copytree(source, tmp_path / "unused"))
    used = Path(shutil.copytree(source, tmp_path / "used"))
    named = {}
    for folder in (gone, unused, used):
        load_to_serve(folder, settings(packs))
        (named[folder],) = set(pack_files(packs)) - set(named.values())
    shutil.rmtree(gone)
    os.utime(named[unused], (0, 0))
    os.utime(named[used], (0, 0))
    load_to_serve(used, settings(packs))
    (packs / "killed.unfinished").write_bytes(b"half")
    (packs / "notes.txt").write_text("of somebody")
    load_to_serve(source, settings(packs))
    assert named[used] in pack_files(packs)
    assert len(pack_files(packs)) == 2
    assert {path.name for path in packs.iterdir()} - {path.name for path in pack_files(packs)} == {
        "lock",
        "notes.txt",
    }


@pytest.mark.parametrize("why", ["a file", "of others", "no space"])
def test_without_a_folder_weights_are_in_private_memory(why, source, packs, caplog, request):
    if why == "a file":
        packs.write_text("")
    elif why == "of others":
        packs.mkdir()
        packs.chmod(0o777)
    else:
        packs = request.getfixturevalue("small_disk") / "packs"
    loaded = load_to_serve(source, settings(packs))
    assert torch.equal(logits(loaded), logits(load_for_inference(source)))
    assert not mapped_from(packs)
    assert len([record for record in caplog.records if "not shared" in record.message]) == 1
    if why != "a file":
        assert not [path for path in packs.iterdir() if path.name != "lock"]


def test_an_empty_setting_turns_it_off_and_none_takes_the_cache_folder(source, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_to_serve(source, ServeConfig(weights_folder=""))
    assert not (tmp_path / "cache").exists()
    load_to_serve(source, ServeConfig())
    assert len(pack_files(tmp_path / "cache" / "moe_ray" / "weights")) == 1


@pytest.mark.slow
def test_quantized_experts_keep_the_perplexity(tmp_path, capsys):
    corpus = copy_corpus(tmp_path)
    config = build_config(
        tiny_settings(corpus, tmp_path / "runs", "tiny"), ["parallel.workers=1", "parallel.ep=1"]
    )
    run(config)

    def perplexity(*options):
        evaluate(str(config.train.run_dir), list(options))
        return json.loads(capsys.readouterr().out.splitlines()[-1])["val_perplexity"]

    full = perplexity()
    for scheme, bound in (("int8", 0.005), ("int4", 0.02)):
        quantized = perplexity(f"serve.quantize={scheme}")
        assert quantized != full
        assert quantized == pytest.approx(full, rel=bound)
