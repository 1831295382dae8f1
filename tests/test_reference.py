"""The reference of all modules that `make docs` writes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def make(out: Path, *modules: str) -> str:
    command = [sys.executable, "-m", "pdoc", "--docformat", "google", "--output-directory", str(out), *modules]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_sections_of_docstrings_are_sections_of_the_page(tmp_path: Path) -> None:
    make(tmp_path, "moe_ray.submission")
    page = (tmp_path / "moe_ray" / "submission.html").read_text(encoding="utf-8")
    assert "Raises:</h6>" in page
    assert "<strong>ConfigError:</strong>" in page
    assert "Arguments:</h6>" in page


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_every_module_has_a_page(tmp_path: Path) -> None:
    packages = ("moe_ray", "jobs", "serve_apps", "cluster")
    said = make(tmp_path, *packages)
    assert "Traceback" not in said
    files = [path for package in packages for path in (ROOT / package).rglob("*.py")]
    modules = [path.relative_to(ROOT).with_suffix("") for path in files]
    names = {str(name.parent if name.name == "__init__" else name) for name in modules}
    assert sorted(name for name in names if not (tmp_path / f"{name}.html").is_file()) == []
