"""A model and a corpus that train in a second."""

import shutil
import sysconfig
from pathlib import Path
from typing import Any

_MODULES = ("argparse", "ast", "bisect", "calendar", "copy", "csv", "dis", "enum", "glob", "heapq", "tokenize")


def copy_corpus(folder: Path) -> Path:
    """Real text: some modules of the standard library, one file each."""
    for name in _MODULES:
        shutil.copy(Path(sysconfig.get_path("stdlib")) / f"{name}.py", folder / f"{name}.txt")
    return folder


def tiny_settings(corpus: Path, storage: Path, name: str) -> dict[str, Any]:
    """Settings of a run of 12 steps of 6 sequences."""
    return {
        "model": {
            "vocab_size": 512,
            "dim": 64,
            "num_layers": 2,
            "num_heads": 2,
            "num_kv_heads": 1,
            "num_experts": 4,
            "top_k": 2,
            "expert_dim": 64,
            "max_sequence_length": 64,
        },
        "data": {
            "sources": [f"code={corpus}/*.txt"],
            "sequence_length": 32,
            "validation_fraction": 0.2,
            "path": str(corpus / "prepared"),
        },
        "optim": {"lr": 5e-3, "warmup_steps": 2},
        "train": {
            "name": name,
            "storage": str(storage),
            "steps": 12,
            "global_batch": 6,
            "micro_batch": 2,
            "log_every": 1,
            "eval_every": 6,
            "eval_batches": 2,
        },
        "checkpoint": {"every": 4},
    }
