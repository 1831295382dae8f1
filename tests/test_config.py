"""Settings: what is wrong is said in one line that names the field, the value and the fix."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moe_ray.config import build_config, describe_settings, load_config, setting_names, to_yaml
from moe_ray.errors import ConfigError


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.topk=3", "unknown setting 'model.topk'.*did you mean 'model.top_k'"),
        ("trian.steps=3", "unknown setting 'trian'.*did you mean 'train'"),
        ("train.stesp=3", "did you mean 'train.steps'"),
        ("optim.learning_rate=1", "did you mean 'optim.lr'"),
        ("optim.learn_rat=1", "did you mean 'optim.lr'"),
        ("sweep.constraints={load_cv: 0.3}", "sweep.constraints={'load_cv': 0.3} .*should be a list"),
        ("train.steps=0", r"train.steps=0 .*greater than 0"),
        ("train.steps=1.5", "train.steps=1.5 .*integer"),
        ("train.steps=many", "train.steps='many' .*integer"),
        ("train.dtype=float8", "train.dtype='float8' .*bfloat16"),
        ("train.steps=true", "train.steps=True is not allowed: input should be no truth value"),
        ("model.top_k=9", "model.top_k=9 .*8"),
        ("model.num_experts=1", "model.top_k=2 is more than model.num_experts=1"),
        ("parallel.ep=3", "parallel.ep=3 does not divide parallel.workers=1"),
        ("model.num_heads=3", "model.dim=256 is not a multiple of model.num_heads=3"),
        ("model.num_kv_heads=3", "model.num_kv_heads=3 does not divide model.num_heads=4"),
        ("model.expert_dim=100", "model.expert_dim=100 is not a multiple of 8.*104"),
        ("model.moe_every=9", "no MoE layer"),
        ("data.sequence_length=4096", "data.sequence_length=4096 is longer than model.max_sequence_length=512"),
        ("optim.warmup_steps=5000", "optim.warmup_steps=5000 is not less than train.steps"),
        ("optim.lr=.nan", "optim.lr=nan .*finite"),
        ("optim.lr=-1", "optim.lr=-1 .*greater than 0"),
        ("serve.min_replicas=20", "serve.min_replicas=20 is more than serve.max_replicas=16"),
        ("serve.max_context=4096", "serve.max_context=4096 is longer"),
        ("train.name=../elsewhere", "train.name='../elsewhere'"),
        ("train.storage=ftp://host/x", "train.storage='ftp://host/x' has the unknown scheme 'ftp'"),
        ("train.steps", "'train.steps' is not section.field=value"),
        ("train=5", "'train=5' is not section.field=value"),
        ("train.name=[", "holds no YAML value"),
        ("train.name=2026-13-45", "holds no YAML value"),
        ("train.storage=~nobody-of-this-name/x", "train.storage='~nobody-of-this-name/x' is no path"),
        ("model.num_layers=1000000000", "model.num_layers=1000000000 .*65536"),
        ("parallel.workers=[1,many]", r"parallel.workers\[1\]='many' is not allowed: .*integer"),
        ("parallel.resources={spot: none}", "parallel.resources.spot='none' is not allowed.*custom resources"),
        ("parallel.workers=1000000007", "parallel.workers=1000000007 .*65536"),
    ],
)
def test_user_mistakes_are_explained_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        build_config({}, [override])
    assert "\n" not in str(error.value)
    assert error.value.fix in str(error.value)


def test_a_dimension_of_a_sweep_can_be_set_alone() -> None:
    tree = {"sweep": {"space": {"optim.lr": {"choice": [1.0]}, "model.top_k": {"choice": [1]}}}}
    config = build_config(tree, ["sweep.space.optim.lr={choice: [2.0]}", "sweep.space.optim.eps={grid: [1]}"])
    assert {name: of.values for name, of in config.sweep.space.items()} == {
        "optim.lr": (2.0,),
        "model.top_k": (1,),
        "optim.eps": (1,),
    }
    assert tree["sweep"]["space"]["optim.lr"] == {"choice": [1.0]}
    with pytest.raises(ConfigError, match=r"unknown setting 'sweep.space.optim.lr.chioce'"):
        build_config({}, ["sweep.space.optim.lr={chioce: [1]}"])


def test_ep_must_divide_the_experts_even_if_it_divides_the_world() -> None:
    with pytest.raises(ConfigError, match=r"parallel.ep=3 does not divide model.num_experts=8.*1, 2, 4, 8"):
        build_config({}, ["parallel.ep=3", "parallel.workers=3"])


def test_overrides_are_yaml_and_beat_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("train: {steps: 300, name: a}\ndata:\nparallel:\n")
    config = load_config(
        path, ["train.steps=200", "optim.lr=3e-4", "data.sources=[a.txt,b/*.md]", "data.path=null"]
    )
    assert (config.train.steps, config.train.name, config.optim.lr) == (200, "a", 3e-4)
    assert config.data.sources == ("a.txt", "b/*.md")


def test_the_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = build_config({}, ["model.top_k=4", "train.name=x", "data.sources=[a]"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("a: [", "cannot be read"),
        ("- 1\n", "not a mapping"),
        ("train: 3\n", "train=3"),
        ("train: {steps: 1, steps: 2}", "'steps' stands twice"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_help_names_every_setting_with_its_default() -> None:
    text = describe_settings()
    for name in setting_names():
        assert name in text
    assert "train.steps  (int, default 1000)" in text


def test_shipped_configs_are_valid() -> None:
    for path in Path("jobs/configs").glob("*.yaml"):
        assert load_config(path).model_dump() != yaml.safe_load(path.read_text())


def test_a_typo_ends_the_job_with_code_2_before_anything_starts(tmp_path: Path) -> None:
    command = [sys.executable, "jobs/train.py", "jobs/configs/quickstart.yaml", f"train.storage={tmp_path}"]
    result = subprocess.run([*command, "model.topk=3"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.strip().startswith("error: unknown setting 'model.topk'")
    assert len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_jobs_print_help() -> None:
    result = subprocess.run([sys.executable, "jobs/train.py", "--help"], capture_output=True, text=True)
    assert result.returncode == 0
    assert "model.top_k  (int, default 2)" in result.stdout


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"model": {"rope_scaling": "linear"}}, "model.rope_scaling='linear' is not a section.*type, factor"),
        ({1: {}}, "the name 1 is no text"),
        ({"model": {1: 2}}, "model.1: the name 1 is no text"),
        ({"sweep": {"space": {True: {"choice": [1]}}}}, "the name True is no text.*put it in quotes"),
    ],
)
def test_names_are_text_and_sections_are_mappings(tree: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(tree)
