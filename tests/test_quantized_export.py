"""Folders with quantized experts: what an endpoint that quantizes at its start computes with, but smaller."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from jobs.evaluate import main as evaluate
from jobs.export import main as export
from moe_ray.checkpoint.inference import InferenceModel, load_for_inference
from moe_ray.config import build_config
from moe_ray.data.prepare import prepare
from moe_ray.errors import CheckpointError, ConfigError
from moe_ray.models.hf.resolve import resolve_model
from moe_ray.models.quantize import QuantizedExperts
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.load_to_serve import load_to_serve
from tests.hf_folders import CASES, make_folder
from tests.tiny import copy_corpus, run, tiny_settings

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTHS = {
    "mixtral": {"intermediate_size": 96},
    "mixtral, tied, window, yarn": {"intermediate_size": 64},
    "olmoe, biases, clipped": {"intermediate_size": 32},
    "qwen3_moe, first layer dense": {"moe_intermediate_size": 32},
    "deepseek_v3, yarn": {"moe_intermediate_size": 64},
    "gpt_oss": {"intermediate_size": 64},
}
schemes = pytest.mark.parametrize("scheme", ["int8", "int4"])


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case with widths that can be quantized, made once."""
    root, made = tmp_path_factory.mktemp("hf"), {}

    def get(case: str) -> Path:
        if case not in made:
            class_name, settings = CASES[case]
            made[case] = make_folder(root / str(len(made)), class_name, settings | WIDTHS[case])
        return made[case]

    return get


@pytest.fixture
def quantized(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A folder that a test may damage."""
    export(str(folder_of("mixtral")), str(tmp_path / "out"), ["quantize=int4"])
    return tmp_path / "out"


def tensors(loaded: InferenceModel) -> dict[str, Tensor]:
    """All but statistics of training, which no folder holds."""
    found = loaded.model.state_dict()
    return {name: found[name] for name in found if not name.endswith("load_fraction_E")}


def assert_same(left: InferenceModel, right: InferenceModel) -> None:
    mine, theirs = tensors(left), tensors(right)
    assert mine.keys() == theirs.keys()
    assert "_codes_" in str(mine.keys())
    for name in mine:
        assert mine[name].dtype == theirs[name].dtype, name
        assert torch.equal(mine[name], theirs[name]), name


@torch.inference_mode()
def logits(loaded: InferenceModel) -> Tensor:
    return loaded.model.logits(loaded.model(torch.arange(24)[None]).hidden_BSD)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@schemes
@pytest.mark.parametrize("case", WIDTHS)
def test_what_is_loaded_is_what_is_quantized_at_load(
    case: str, scheme: Any, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = folder_of(case), tmp_path / "out"
    export(str(source), str(out), [f"quantize={scheme}", "max_shard_bytes=20000"])
    assert len(list(out.glob("*.safetensors"))) > 1
    loaded = load_for_inference(out)
    assert loaded.quantize == scheme
    assert_same(loaded, load_for_inference(source, quantize=scheme))
    # Asking for what it is changes nothing.
    assert_same(loaded, load_for_inference(out, quantize=scheme))
    assert json.loads((out / "config.json").read_text())["quantization_config"]["scheme"] == scheme
    for moe in loaded.model.moe_modules():
        assert isinstance(moe.experts, QuantizedExperts)
        assert moe.experts.w_in_codes_e.dtype in (torch.int8, torch.uint8)


@schemes
def test_bfloat16_is_rounded_before_experts_are_quantized_as_in_an_endpoint(
    scheme: Any, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = folder_of("gpt_oss"), tmp_path / "out"
    export(str(source), str(out), [f"quantize={scheme}", "dtype=bfloat16"])
    assert_same(load_for_inference(out, "bfloat16"), load_for_inference(source, "bfloat16", quantize=scheme))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8.5), ("int4", 5)])
def test_files_hold_codes_and_all_else_as_it_was(
    scheme: str, bits: float, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = folder_of("deepseek_v3, yarn"), tmp_path / "out"
    export(str(source), str(out), [f"quantize={scheme}"])
    before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    experts = [name for name in before if ".experts." in name]
    assert experts
    for name in before.keys() - set(experts):
        assert torch.equal(before[name], after[name]), name
    numbers = sum(before[name].numel() for name in experts)
    assert size(out) < size(source) - numbers * 4 + numbers * bits / 8 + 40_000 * 4
    assert after.keys() == before.keys() | {f"{name}_scale" for name in experts}
    held = sum(tensor.nbytes for tensor in tensors(load_for_inference(out)).values())
    assert held < sum(tensor.nbytes for tensor in tensors(load_for_inference(source)).values()) - numbers * 2


@schemes
def test_endpoints_share_a_quantized_folder_and_answer_as_before(
    scheme: Any, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    source, out = folder_of("mixtral"), tmp_path / "out"
    export(str(source), str(out), [f"quantize={scheme}"])
    config = ServeConfig(weights_folder=str(tmp_path / "packs"))
    expected = logits(load_for_inference(source, quantize=scheme))
    for _ in ("made", "found"):
        torch.testing.assert_close(logits(load_to_serve(out, config)), expected)
    asks = config.model_copy(update={"quantize": scheme})
    for loaded, settings in ((load_to_serve(out, config), config), (load_for_inference(source), asks)):
        service = CompletionService(loaded, settings)
        service.close()
        assert service.model_body["quantize"] == scheme


@schemes
@pytest.mark.parametrize("class_name", ["AutoModelForCausalLM", "MixtralForCausalLM"])
def test_transformers_refuses_what_it_cannot_read(
    class_name: str,
    scheme: str,
    folder_of: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    export(str(folder_of("mixtral")), str(tmp_path / "out"), [f"quantize={scheme}"])
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with pytest.raises(RuntimeError, match="mismatched_sizes"):
            getattr(transformers, class_name).from_pretrained(tmp_path / "out")
    finally:
        logger.removeHandler(caplog.handler)
    assert "Unknown quantization type, got moe_ray" in caplog.text
    assert "gate_up_proj" in caplog.text
    AutoModelForCausalLM.from_pretrained(folder_of("mixtral"))


def test_another_scheme_than_that_of_the_folder_is_refused(quantized: Path) -> None:
    with pytest.raises(ConfigError, match=r"serve\.quantize=int8 is not possible, .* has experts in int4"):
        load_for_inference(quantized, quantize="int8")


def test_a_quantized_folder_is_neither_trained_nor_exported_again(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.init_from=.* has experts in int4, which cannot be trained"):
        resolve_model(build_config({"model": {"preset": "mixtral", "init_from": str(quantized)}}))
    for options in ([], ["quantize=int4"], ["dtype=bfloat16"]):
        with pytest.raises(ConfigError, match="has experts in int4 already"):
            export(str(quantized), str(tmp_path / "again"), options)
    assert not (tmp_path / "again").exists()


def test_bad_options_and_widths(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantize='int2' is not allowed.*none, int8, int4"):
        export(str(folder_of("mixtral")), str(tmp_path / "out"), ["quantize=int2"])
    narrow = make_folder(tmp_path / "narrow", *CASES["mixtral"])
    with pytest.raises(ConfigError, match=r"model\.expert_dim=16 is no multiple of 32.*int8"):
        export(str(narrow), str(tmp_path / "out"), ["quantize=int4"])
    export(str(narrow), str(tmp_path / "out"), ["quantize=int8"])
    assert load_for_inference(tmp_path / "out").quantize == "int8"


@pytest.mark.parametrize(
    "said", [{"scheme": "int2"}, {}, {"scheme": ["int4"]}, {"scheme": "int4", "group_size": 64}]
)
def test_a_scheme_that_is_unknown_is_refused(said: dict[str, Any], quantized: Path) -> None:
    change_config(quantized, quantization_config={"quant_method": "moe_ray"} | said)
    with pytest.raises(CheckpointError, match=r"quantization_config=.*scheme of int8, int4"):
        load_for_inference(quantized)


@pytest.mark.parametrize("damage", ["other scheme", "no scheme", "other type", "scale gone"])
def test_codes_that_do_not_fit_the_config_are_refused(damage: str, quantized: Path) -> None:
    weights = load_file(quantized / "model.safetensors")
    name = next(name for name in weights if name.endswith("w2.weight"))
    if damage == "other scheme":
        change_config(quantized, quantization_config={"quant_method": "moe_ray", "scheme": "int8"})
    elif damage == "no scheme":
        change_config(quantized, quantization_config=None)
    elif damage == "other type":
        weights[name] = weights[name].view(torch.int8)
    else:
        del weights[f"{name}_scale"]
    save_file(weights, quantized / "model.safetensors", {"format": "pt"})
    message = {"other type": f"{name} of type I8", "scale gone": f"lacks the tensor {name}_scale"}
    with pytest.raises(CheckpointError, match=message.get(damage, "of shape .* asks for")):
        load_for_inference(quantized)


def test_a_run_is_exported_and_evaluated_as_at_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny_settings(copy_corpus(tmp_path), tmp_path / "runs", "tiny")
    config = build_config(settings, ["parallel.workers=1", "parallel.ep=1", "train.steps=4"])
    run(config)
    source, out = config.train.run_dir, tmp_path / "out"

    def perplexity(folder: Any, *options: str) -> float:
        evaluate(str(folder), list(options))
        return json.loads(capsys.readouterr().out.splitlines()[-1])["val_perplexity"]

    export(str(source), str(out), ["quantize=int8"])
    data = f"data.path={prepare(config)}"
    length = f"data.sequence_length={config.data.sequence_length}"
    assert perplexity(out, data, length) == pytest.approx(perplexity(source, "serve.quantize=int8"), rel=1e-6)
    assert_same(load_for_inference(out), load_for_inference(source, quantize="int8"))
