"""Every command line and link of every page: understood by its program, and leading somewhere."""

import importlib.util
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest
from ray.serve.scripts import cli as serve_cli

from jobs import chaos, doctor, monitor, report
from moe_ray.config import build_config, load_config
from tests.ray_commands import check_ray

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Of others; those that our files are given to have tests of their own, in tests/test_deployment.py and beside.
FOREIGN = {"aws", "curl", "docker", "gcloud", "kubectl", "prometheus", "python3"}
SHELL = {"source", ".", "export", "ulimit", "(umask"}


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


LINES = sorted({line for page in PAGES for line in commands(page)})


def check_config(words: Sequence[str]) -> None:
    """`CONFIG section.field=value …`, or only help."""
    if words != ["--help"]:
        is_ours = not words[0].endswith("/best.yaml")
        load_config(ROOT / (words[0] if is_ours else "jobs/configs/quickstart.yaml"), words[1:])


def check_evaluate(words: Sequence[str]) -> None:
    build_config({}, words[1:])


def check_export(words: Sequence[str]) -> None:
    assert all(re.fullmatch(r"(dtype|quantize|max_shard_bytes)=\w+", option) for option in words[2:])


def check_chaos(words: Sequence[str]) -> None:
    options = chaos.parse(words)
    load_config(ROOT / options.config, options.overrides)


def check_watch(words: Sequence[str]) -> None:
    assert set(words[1:]) <= {"--once"}


def check_name(words: Sequence[str]) -> None:
    assert len(words) == 1


JOBS: dict[str, Callable[[Sequence[str]], object]] = {
    "api_key": check_name,
    "chaos": check_chaos,
    "doctor": doctor._parse,
    "evaluate": check_evaluate,
    "export": check_export,
    "monitor": monitor._parse,
    "prepare": check_config,
    "report": report.parse,
    "sweep": check_config,
    "train": check_config,
    "watch": check_watch,
}


def check_python(words: Sequence[str]) -> None:
    if words[1] == "-m":
        assert importlib.util.find_spec(words[2])
        return
    job = re.fullmatch(r"(?:/opt/moe_ray/)?jobs/(\w+)\.py", words[1])
    assert job, f"{words[1]} is no job"
    assert (ROOT / "jobs" / f"{job[1]}.py").is_file()
    JOBS[job[1]](words[2:])


def check_serve(words: Sequence[str]) -> None:
    command = serve_cli.get_command(click.Context(serve_cli), words[1])
    assert command is not None, f"serve knows no {words[1]}"
    target, *given = [word for word in words[2:] if not word.startswith("-")] or ["serve_apps.moe_lm:build"]
    assert (ROOT / target).is_file() or target == "serve_apps.moe_lm:build"
    build_config({}, [word for word in given if not word.startswith("checkpoint=")])
    command.make_context(words[1], list(words[2:]))


def check_make(words: Sequence[str]) -> None:
    subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)


def check(words: list[str]) -> None:
    program = words[0].rpartition("/")[2]
    if program == "ray":
        check_ray(words)
        for name in (word for word in words if word.startswith("cluster/")):
            assert (ROOT / name).is_file()
        if "python" in words:
            check(words[words.index("python") :])
    elif program not in FOREIGN | SHELL:
        {"python": check_python, "serve": check_serve, "make": check_make}[program](words)


@pytest.mark.parametrize("line", LINES)
def test_the_program_understands_its_command(line: str) -> None:
    check(shlex.split(line))


@pytest.mark.parametrize(
    "line",
    [
        "python jobs/train.py jobs/configs/quickstart.yaml train.stepz=3",
        "python jobs/missing.py",
        "python -m cluster.missing",
        "ray job submit --workin-dir . -- python jobs/doctor.py",
        "ray job submit -- python jobs/doctor.py --jsn",
        "serve deploy missing.yaml",
        "serve run serve_apps.moe_lm:build serve.max_replica=3",
        "unknown",
    ],
)
def test_a_wrong_command_is_found(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check(shlex.split(line))


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"]({page.name})" not in index] == ["README.md"]


def test_the_architecture_names_what_there_is() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"`([\w/]+(?:\.py|/))`", text):
        assert list((ROOT / "moe_ray").rglob(name)) or (ROOT / name).exists(), name
