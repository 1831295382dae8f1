"""Hugging Face folders: the same logits and tokens as `transformers`, and the same bytes after a round trip."""

import json
import random
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from jobs.export import main as export
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.config import ModelConfig
from moe_ray.errors import CheckpointError, ConfigError, StorageError
from moe_ray.models.hf.config import architecture_of, read_config
from moe_ray.models.hf.files import WeightFiles
from moe_ray.models.hf.load import load_weights, open_folder, read_model_config
from moe_ray.models.hf.save import save_folder
from moe_ray.models.transformer import Transformer, build_model
from moe_ray.parallel.mesh import build_mesh
from moe_ray.parallel.shard import build_sharded_model
from moe_ray.serving.engine.engine import Engine
from moe_ray.serving.engine.request import Request, SamplingParams
from moe_ray.telemetry.clock import PhaseClock
from tests.hf_folders import CASES, load_reference, make_folder, tokenizer
from tests.worlds import run_world

NEW_TOKENS = 12
cases = pytest.mark.parametrize("case", CASES)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case, made once."""
    root, made = tmp_path_factory.mktemp("hf"), {}

    def get(case: str) -> Path:
        if case not in made:
            made[case] = make_folder(root / str(len(made)), *CASES[case])
        return made[case]

    return get


@pytest.fixture
def mixtral(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder_of("mixtral"), tmp_path / "copy"))


def prompt(length: int = 24) -> list[int]:
    rng = random.Random(0)
    return [rng.randrange(1, tokenizer().vocab_size) for _ in range(length)]


@torch.inference_mode()
def our_logits(model: Transformer) -> Tensor:
    return model.logits(model(torch.tensor([prompt()])).hidden_BSD)


@torch.inference_mode()
def their_logits(folder: Path, **options: Any) -> Tensor:
    return load_reference(folder, **options)(torch.tensor([prompt()])).logits


def stored(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of every tensor."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                content = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
                tensors[name] = (str(tensor.dtype), list(tensor.shape), content)
    return tensors


@cases
def test_logits_and_greedy_texts_equal(case: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(case)
    model = load_for_inference(folder).model
    torch.testing.assert_close(our_logits(model), their_logits(folder), rtol=1e-4, atol=1e-4)
    tokens = load_reference(folder).generate(
        torch.tensor([prompt()]), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )[0, len(prompt()) :]
    engine = Engine(model, tokenizer(), max_batch_size=2, max_context=64, prefill_tokens=16)
    engine.submit(Request("one", tuple(prompt()), SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)))
    chunks = []
    while engine.has_work:
        chunks += engine.step()
    assert "".join(chunk.text for chunk in chunks) == tokenizer().decode(tokens.tolist())
    assert chunks[-1].num_tokens == len(tokens)


@cases
def test_export_has_the_same_bytes(case: str, folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of(case)
    export(str(folder), str(tmp_path / "out"), [])
    assert stored(tmp_path / "out") == stored(folder)
    assert read_model_config(tmp_path / "out") == read_model_config(folder)
    assert torch.equal(their_logits(tmp_path / "out"), their_logits(folder))


def test_texts_end_as_the_generation_config_says(mixtral: Path) -> None:
    assert load_for_inference(mixtral).tokenizer.eos_id == tokenizer().eos_id == 0
    for eos_id in (7, [7, 0]):
        (mixtral / "generation_config.json").write_text(json.dumps({"eos_token_id": eos_id}))
        assert load_for_inference(mixtral).tokenizer.eos_id == 7
    (mixtral / "generation_config.json").unlink()
    change_config(eos_token_id=9)(mixtral)
    assert load_for_inference(mixtral).tokenizer.eos_id == 9


def test_bfloat16_with_float32_expert_biases_keeps_its_bytes(
    folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(folder_of("deepseek_v3, yarn"), tmp_path / "mixed"))
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if not name.endswith("e_score_correction_bias"):
            tensors[name] = tensors[name].bfloat16()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    export(str(folder), str(tmp_path / "out"), [])
    assert stored(tmp_path / "out") == stored(folder)
    assert len({dtype for dtype, _, _ in stored(folder).values()}) == 2
    logits = our_logits(load_for_inference(folder).model)
    torch.testing.assert_close(logits, their_logits(folder, dtype=torch.float32), rtol=1e-4, atol=1e-4)


def test_shards(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "sharded", *CASES["gpt_oss"], max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert torch.equal(
        our_logits(load_for_inference(folder).model), our_logits(load_for_inference(folder_of("gpt_oss")).model)
    )
    export(str(folder), str(tmp_path / "out"), ["max_shard_bytes=9000"])
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3
    assert files == sorted(set(index["weight_map"].values()))
    assert stored(tmp_path / "out") == stored(folder)
    assert index["metadata"]["total_size"] == sum(len(content) for _, _, content in stored(folder).values())
    assert torch.equal(their_logits(tmp_path / "out"), their_logits(folder))


def test_export_to_bfloat16(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = folder_of("deepseek_v3, yarn")
    export(str(folder), str(tmp_path / "out"), ["dtype=bfloat16"])
    for name, (dtype, _, _) in stored(tmp_path / "out").items():
        assert dtype == ("torch.float32" if name.endswith("correction_bias") else "torch.bfloat16")
    assert load_reference(tmp_path / "out").dtype == torch.bfloat16


SMALL = {"dim": 32, "num_heads": 4, "num_layers": 4, "num_experts": 8, "expert_dim": 16, "top_k": 2}
PRESETS: dict[str, dict[str, Any]] = {
    "basic": {"num_kv_heads": 2},
    "mixtral": {"num_kv_heads": 2, "rope_scaling": {"type": "llama3", "factor": 8, "original_length": 64}},
    "olmoe": {"num_kv_heads": 4, "clip_qkv": 1.0},
    "qwen3_moe": {"num_kv_heads": 1, "head_dim": 16, "num_dense_layers": 1, "moe_every": 2, "dense_dim": 40},
    "deepseek_v3": {"num_kv_heads": 4, "num_dense_layers": 2, "num_expert_groups": 4, "num_limited_groups": 3},
    "gpt_oss": {"num_kv_heads": 2, "sliding_window": 7},
}


@pytest.mark.parametrize("preset", PRESETS)
def test_our_own_models_are_what_transformers_computes(preset: str, tmp_path: Path) -> None:
    config = ModelConfig.model_validate(
        {"preset": preset, "vocab_size": tokenizer().vocab_size, "init_std": 0.3} | SMALL | PRESETS[preset]
    )
    model = build_model(config, seed=0).eval()
    save_folder(model, tmp_path / "out", tokenizer_json=b"{}", sidecars={})
    torch.testing.assert_close(our_logits(model), their_logits(tmp_path / "out"), rtol=1e-4, atol=1e-4)
    assert architecture_of(read_model_config(tmp_path / "out")).name == architecture_of(config).name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 512


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"preset": "switch"}, "activation"),
        ({"preset": "glam"}, "activation"),
        ({"preset": "gpt_oss", "num_shared_experts": 1}, "num_shared_experts"),
        ({"preset": "deepseek_v3", "num_shared_experts": 0}, "num_shared_experts"),
        ({"preset": "deepseek_v3", "num_expert_groups": 64, "num_limited_groups": 32}, "num_expert_groups"),
        ({"preset": "deepseek_v3", "expert_bias": False}, "expert_bias"),
        ({"preset": "mixtral", "qk_norm": "head", "num_shared_experts": 1}, "qk_norm"),
        ({"noisy_top_k": True}, "noisy_top_k"),
        ({"router": "expert_choice"}, "router"),
        ({"sliding_window": 8, "full_attention_every": 2}, "sliding_window"),
    ],
)
def test_what_no_architecture_has_is_refused_by_name(settings: dict[str, Any], field: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"model\.{field}=\S+ .*cannot be expressed by"):
        architecture_of(ModelConfig.model_validate(settings))


def test_settings_of_the_same_meaning_are_exported() -> None:
    same = {"softmax_after_top_k": True, "route_norm": False, "capacity_factor": 2.0, "router_jitter": 0.1}
    assert architecture_of(ModelConfig.model_validate(same)).name == "mixtral"


OLD_ROPE = {
    "deepseek_v3, yarn": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "mscale": 1.0},
    "mixtral, tied, window, yarn": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16},
    "olmoe, normalised, llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "gpt_oss": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


# The config.json of published models, without names and token ids, and their parameters in all and per token.
PUBLISHED: dict[str, tuple[dict[str, Any], float, float]] = {
    "Mixtral-8x7B-v0.1": (
        {
            **{"model_type": "mixtral", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096},
            **{"initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768},
            **{"num_attention_heads": 32, "num_experts_per_tok": 2, "num_hidden_layers": 32, "vocab_size": 32000},
            **{"num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False, "rope_theta": 1e6},
            **{"rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.02, "sliding_window": None, "use_cache": True},
        },
        46.7e9,
        12.9e9,
    ),
    "OLMoE-1B-7B-0924": (
        {
            **{"model_type": "olmoe", "attention_bias": False, "clip_qkv": None, "hidden_act": "silu"},
            **{"hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096},
            **{"norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8},
            **{"num_hidden_layers": 16, "num_key_value_heads": 16, "rms_norm_eps": 1e-5, "rope_scaling": None},
            **{"rope_theta": 10000.0, "router_aux_loss_coef": 0.01, "vocab_size": 50304},
        },
        6.92e9,
        1.28e9,
    ),
    "Qwen3-30B-A3B": (
        {
            **{"model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128},
            **{"hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144, "max_window_layers": 48},
            **{"max_position_embeddings": 40960, "mlp_only_layers": [], "moe_intermediate_size": 768},
            **{"norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8},
            **{"num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
            **{"rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "vocab_size": 151936},
        },
        30.5e9,
        3.35e9,
    ),
    "DeepSeek-V3": (
        {
            **{"model_type": "deepseek_v3", "attention_bias": False, "auto_map": {}, "ep_size": 1},
            **{"first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "vocab_size": 129280},
            **{"intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840},
            **{"moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256},
            **{"n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "topk_group": 4},
            **{"num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "q_lora_rank": 1536},
            **{"num_nextn_predict_layers": 1, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128},
            **{"rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid"},
            **{"topk_method": "noaux_tc", "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
            "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
            "rope_scaling": {
                **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
                **{"original_max_position_embeddings": 4096, "type": "yarn"},
            },
        },
        671e9,
        37.5e9,
    ),
    "gpt-oss-20b": (
        {
            **{"model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4, "head_dim": 64},
            **{"hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096, "vocab_size": 201088},
            **{"intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 12},
            **{"max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4},
            **{"num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32, "rms_norm_eps": 1e-5},
            **{"rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0},
            "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
            "rope_scaling": {
                **{"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False},
                "original_max_position_embeddings": 4096,
            },
        },
        20.9e9,
        4.2e9,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_understood(name: str) -> None:
    tree, num_params, num_active_params = PUBLISHED[name]
    architecture, settings = read_config(tree)
    config = ModelConfig.model_validate({"preset": architecture.name} | settings)
    assert config.num_params() == pytest.approx(num_params, rel=0.005)
    assert config.num_active_params() == pytest.approx(num_active_params, rel=0.02)
    assert architecture_of(config) is architecture


@pytest.mark.parametrize("case", OLD_ROPE)
def test_published_form_of_rotary_positions(case: str, folder_of: Callable[[str], Path]) -> None:
    tree = json.loads((folder_of(case) / "config.json").read_text())
    old = {key: value for key, value in tree.items() if key != "rope_parameters"}
    old |= {"rope_theta": tree["rope_parameters"]["rope_theta"], "rope_scaling": OLD_ROPE[case]}
    if case.startswith("deepseek"):
        old["rope_scaling"]["mscale_all_dim"] = 0.7
    assert ModelConfig.model_validate(read_config(old)[1]) == ModelConfig.model_validate(read_config(tree)[1])


def change_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    return rewrite


def truncate(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def write(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


NORM = "model.norm.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
INDEX = "model.safetensors.index.json"
# One thing wrong with a complete folder, and what must be said.
BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config no JSON": (write("config.json", "{"), r"config\.json' is no JSON object"),
    "other architecture": (change_config(model_type="mamba"), "model_type='mamba'.*mixtral"),
    "other activation": (change_config(hidden_act="gelu"), "hidden_act='gelu'"),
    "unknown key": (change_config(residual_scale=2.0), r"residual_scale=2\.0, which is unknown for mixtral"),
    "key gone": (lambda folder: drop_key(folder, "hidden_size"), "lacks hidden_size"),
    "wrong type": (change_config(num_hidden_layers="four"), "model.num_layers='four'"),
    "wrong type of a part": (change_config(hidden_size="wide", head_dim=None), "a value of the wrong type"),
    "rope no mapping": (change_config(rope_parameters=7), "a value of the wrong type"),
    "rope type": (change_config(rope_parameters={"rope_type": "longrope"}), "rope_type='longrope'.*llama3"),
    "rope key": (
        change_config(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        r"partial_rotary_factor=0\.5",
    ),
    "more layers": (change_config(num_hidden_layers=5), r"lacks the tensor model\.layers\.4\."),
    "wider": (change_config(intermediate_size=24), r"model\.safetensors' has .* of shape .* asks for"),
    "tensor missing": (change_tensors(lambda tensors: tensors.pop(EXPERT)), f"lacks the tensor {EXPERT}"),
    "tensor too many": (
        change_tensors(lambda tensors: tensors.update({"model.extra.weight": torch.zeros(1)})),
        r"has the tensor model\.extra\.weight, for which",
    ),
    "wrong shape": (
        change_tensors(lambda tensors: tensors.update({NORM: torch.zeros(31)})),
        rf"{NORM} of shape \(31,\) where config\.json asks for \(32,\)",
    ),
    "type": (
        change_tensors(lambda tensors: tensors.update({NORM: torch.zeros(32, dtype=torch.int8)})),
        f"has {NORM} of type I8",
    ),
    "truncated": (truncate, r"model\.safetensors' is damaged"),
    "no safetensors": (write("model.safetensors", "x" * 99), r"model\.safetensors' is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors' is missing"),
    "shard missing": (write(INDEX, '{"weight_map": {"a": "b.safetensors"}}'), r"b\.safetensors' is missing"),
    "index wrong": (
        write(INDEX, '{"weight_map": {"a.weight": "model.safetensors"}}'),
        r"model\.safetensors' lacks the tensor a\.weight",
    ),
    "index outside": (write(INDEX, '{"weight_map": {"a": "../b.safetensors"}}'), "outside the folder"),
    "index no JSON": (write(INDEX, "[1]"), "is no index of weights"),
}


def drop_key(folder: Path, key: str) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({name: tree[name] for name in tree if name != key}))


@pytest.mark.parametrize("what", BAD_FOLDERS)
def test_bad_folders_are_refused_in_one_line(what: str, mixtral: Path) -> None:
    damage, message = BAD_FOLDERS[what]
    damage(mixtral)
    with pytest.raises(CheckpointError, match=message) as error:
        load_for_inference(mixtral)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("case", "values", "message"),
    [
        ("gpt_oss", {"layer_types": ["full_attention", *["sliding_attention"] * 3]}, "layer_types="),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types="),
        ("qwen3_moe, first layer dense", {"mlp_only_layers": [1]}, r"mlp_only_layers=\[1\]"),
        ("deepseek_v3, yarn", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("deepseek_v3, yarn", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("olmoe, biases, clipped", {"sliding_window": 8}, "sliding_window=8"),
    ],
)
def test_layouts_that_we_lack_are_refused(
    case: str, values: dict[str, Any], message: str, folder_of: Callable[[str], Path]
) -> None:
    tree = json.loads((folder_of(case) / "config.json").read_text())
    with pytest.raises(CheckpointError, match=message):
        read_config(tree | values)


def test_what_published_folders_hold_besides_is_skipped(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folder_of("deepseek_v3, yarn"), tmp_path / "published"))
    extra = {"model.layers.4.eh_proj.weight": torch.zeros(2), "model.layers.0.self_attn.rotary_emb.inv_freq": None}
    change_tensors(lambda tensors: tensors.update({name: torch.zeros(2) for name in extra}))(folder)
    published = {
        "auto_map": {"x": "y"},
        "ep_size": 1,
        "seq_aux": True,
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }
    change_config(**published, num_nextn_predict_layers=1, scoring_func="sigmoid", torch_dtype="bfloat16")(folder)
    plain = load_for_inference(folder_of("deepseek_v3, yarn")).model
    assert torch.equal(our_logits(load_for_inference(folder).model), our_logits(plain))


def test_existing_folder_is_refused_and_nothing_half_written_stays(
    mixtral: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        export(str(mixtral), str(mixtral), [])

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe_ray.models.hf.save.sync", fail)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match=r"No space left.*Fix: free space"):
        export(str(mixtral), str(tmp_path / "out"), [])
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["dtype=int8"], "dtype='int8'.*float32, bfloat16"),
        (["max_shard_bytes=0"], "max_shard_bytes='0'"),
        (["type=float32"], "unknown option 'type'"),
    ],
)
def test_bad_options_of_export(options: list[str], message: str, mixtral: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        export(str(mixtral), str(tmp_path / "out"), options)


def check_shares(rank: int, folders: dict[Path, Tensor]) -> None:
    for folder, expected in folders.items():
        check_share(rank, folder, expected)


def check_share(rank: int, folder: Path, expected: Tensor) -> None:
    torch.set_num_threads(1)
    reads = []

    class Recorded(WeightFiles):
        def read(self, name: str, rows: slice | None = None) -> Tensor:
            tensor = super().read(name, rows)
            reads.append((name, rows, len(tensor)))
            return tensor

    pytest.MonkeyPatch().setattr("moe_ray.models.hf.load.WeightFiles", Recorded)
    config = read_model_config(folder)
    mesh = build_mesh(2)
    model = build_sharded_model(config, 0, mesh, PhaseClock(mesh.device, enabled=False)).eval()
    load_weights(open_folder(folder, model), model)
    mine = range(rank * config.num_experts // 2, (rank + 1) * config.num_experts // 2)
    for name, rows, length in reads:
        if "experts." in name and "shared" not in name:
            if rows is None:
                assert int(name.split("experts.")[1].split(".")[0]) in mine
            else:
                assert (rows, length) == (slice(mine.start, mine.stop), len(mine))
    assert any("experts." in name for name, _, _ in reads)
    torch.testing.assert_close(our_logits(model), expected, rtol=1e-4, atol=1e-4)


def test_each_rank_reads_only_its_experts(folder_of: Callable[[str], Path]) -> None:
    folders = [folder_of(case) for case in ("mixtral", "deepseek_v3, yarn", "gpt_oss")]
    run_world(2, check_shares, {folder: their_logits(folder) for folder in folders})


def quantise_fp8(folder: Path) -> dict[str, Tensor]:
    """Put matrices into float8 with the scales of their blocks, as in DeepSeek-V3; returns what they stand for."""
    tensors, meant = load_file(folder / "model.safetensors"), {}
    for name in list(tensors):
        if "proj" in name and name.endswith("weight"):
            rows, columns = tensors[name].shape
            scale = torch.rand(-(-rows // 128), -(-columns // 128)) + 0.5
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale
            block = torch.ones(128, 128)
            meant[name] = tensors[name].float() * torch.kron(scale, block)[:rows, :columns]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})(folder)
    return meant


def quantise_mxfp4(folder: Path) -> dict[str, Tensor]:
    """Put random four-bit experts in place, as in gpt-oss; returns what they stand for."""
    tensors, meant = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for name in list(tensors):
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensors.pop(name).shape
            shape = (experts, outputs, inputs // 32, 16)
            blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            scales = torch.randint(122, 126, shape[:-1], dtype=torch.uint8, generator=generator)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            meant[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(quantization_config={"quant_method": "mxfp4"})(folder)
    return meant


QUANTISED = {
    "fp8": ("deepseek_v3, yarn", {"hidden_size": 160, "intermediate_size": 136, "moe_intermediate_size": 40}),
    "mxfp4": ("gpt_oss", {"hidden_size": 64, "intermediate_size": 32}),
}


@pytest.mark.parametrize("method", QUANTISED)
def test_published_quantised_weights_are_dequantised(method: str, tmp_path: Path) -> None:
    case, sizes = QUANTISED[method]
    class_name, settings = CASES[case]
    plain = make_folder(tmp_path / "plain", class_name, settings | sizes)
    folder = Path(shutil.copytree(plain, tmp_path / "quantised"))
    meant = (quantise_fp8 if method == "fp8" else quantise_mxfp4)(folder)
    assert meant
    change_tensors(lambda tensors: tensors.update(meant | {n: t.float().contiguous() for n, t in meant.items()}))(
        plain
    )
    logits = our_logits(load_for_inference(folder).model)
    torch.testing.assert_close(logits, their_logits(plain), rtol=1e-4, atol=1e-4)
    export(str(folder), str(tmp_path / "out"), [])
    assert {name: stored(tmp_path / "out")[name][0] for name in meant} == dict.fromkeys(meant, "torch.bfloat16")
    scales = next(name for name in load_file(folder / "model.safetensors") if "scale" in name)
    change_tensors(lambda tensors: tensors.update({scales: tensors[scales].flatten()}))(folder)
    with pytest.raises(CheckpointError, match=rf"{scales} of shape"):
        load_for_inference(folder)


def test_other_quantisation_is_refused(mixtral: Path) -> None:
    change_config(quantization_config={"quant_method": "gptq"})(mixtral)
    with pytest.raises(CheckpointError, match=r"quant_method='gptq'.*in mxfp4"):
        load_for_inference(mixtral)


def test_the_index_decides_which_file_a_tensor_is_read_from(mixtral: Path) -> None:
    weights = load_file(mixtral / "model.safetensors")
    (mixtral / "model.safetensors").unlink()
    save_file(weights, mixtral / "a.safetensors")
    save_file({"model.norm.weight": torch.zeros_like(weights["model.norm.weight"])}, mixtral / "b.safetensors")
    other = {"z": torch.zeros(1)}
    index = {"weight_map": dict.fromkeys(weights, "a.safetensors")}
    (mixtral / "model.safetensors.index.json").write_text(json.dumps(index))
    read = WeightFiles(mixtral).read("model.norm.weight")
    assert torch.equal(read, weights["model.norm.weight"])
    # The second file is named for another tensor, and holds an old copy of this one.
    save_file(other | {"model.norm.weight": read * 0}, mixtral / "b.safetensors")
    index["weight_map"]["z"] = "b.safetensors"
    (mixtral / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(WeightFiles(mixtral).read("model.norm.weight"), weights["model.norm.weight"])


def test_a_head_that_differs_from_the_tied_embedding_is_refused(mixtral: Path) -> None:
    tree = json.loads((mixtral / "config.json").read_text())
    (mixtral / "config.json").write_text(json.dumps(tree | {"tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_for_inference(mixtral)


def test_the_shapes_of_the_files_are_checked_before_memory_is_taken(mixtral: Path) -> None:
    tree = json.loads((mixtral / "config.json").read_text())
    (mixtral / "config.json").write_text(json.dumps(tree | {"intermediate_size": 2**20}))
    with pytest.raises(CheckpointError, match=r"where config.json asks for"):
        load_for_inference(mixtral)
    (mixtral / "config.json").write_text(json.dumps(tree | {"num_hidden_layers": 10**12}))
    with pytest.raises(CheckpointError, match="num_hidden_layers=1000000000000"):
        load_for_inference(mixtral)
    (mixtral / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="no JSON object"):
        load_for_inference(mixtral)


def test_two_exports_to_one_folder_leave_one_that_is_whole(mixtral: Path, tmp_path: Path) -> None:
    problems: list[Exception] = []

    def run() -> None:
        try:
            export(str(mixtral), str(tmp_path / "out"), ["max_shard_bytes=2000"])
        except (ConfigError, StorageError) as error:
            problems.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(problems) == 3
    assert WeightFiles(tmp_path / "out").dtype("model.norm.weight") == torch.float32
    load_for_inference(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
