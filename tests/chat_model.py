"""A tiny chat model in a Hugging Face folder, and a server of its routes in the test process."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import torch
import uvicorn

from moe_ray.checkpoint.inference import InferenceModel, load_for_inference
from moe_ray.config import ModelConfig
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.models.hf.save import save_folder
from moe_ray.models.transformer import build_model
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.access import Access
from moe_ray.serving.app import make_app
from moe_ray.serving.completions import CompletionService
from tests.conftest import free_port

# As ChatML, with a trim and a loop control, and refusing what some templates refuse.
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {%- if message.role == 'assistant' and loop.first %}{{ raise_exception('the user begins') }}{% endif %}
    {%- if not message.content %}{% continue %}{% endif %}
<|im_start|>{{ message.role }}{{ ' ' + mood if mood is defined else '' }}
{{ message.content | trim }}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% generation %}{% endgeneration %}
{%- endif %}
"""
TEXTS = [
    "the cat sat on the mat and saw the other cat",
    "naïve 東京 🙂",
    '{"name": "cat", "legs": [1, 2.5e3, true]}',
]
MAX_CONTEXT = 512
NAME = "chat"


def write_chat_folder(folder: Path, max_context: int = MAX_CONTEXT) -> Path:
    """A random Mixtral with a chat tokenizer; a text ends with either of two tokens."""
    backend = tokenizers.Tokenizer.from_str(train_tokenizer(TEXTS * 5, 300).serialized)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer_json = backend.to_str().encode()
    config = ModelConfig(
        vocab_size=backend.get_vocab_size(),
        dim=32,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        num_experts=4,
        expert_dim=32,
        max_sequence_length=max_context,
        init_std=0.4,
    )
    ends = [backend.token_to_id("<|im_end|>"), backend.token_to_id("<|endoftext|>")]
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|endoftext|>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
    }
    sidecars = {
        "tokenizer_config.json": json.dumps(tokenizer_config).encode(),
        "generation_config.json": json.dumps({"eos_token_id": ends}).encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }
    model = build_model(config, seed=0)
    # Texts end by their length.
    model.embed.weight.data[ends] = 0
    save_folder(model, folder, tokenizer_json=tokenizer_json, sidecars=sidecars)
    return folder


def load_chat_model(folder: Path) -> InferenceModel:
    """The model of `write_chat_folder`."""
    torch.set_num_threads(1)
    return load_for_inference(folder)


@contextlib.contextmanager
def served(model: InferenceModel, config: ServeConfig, access: Access | None = None) -> Iterator[str]:
    """The address of a real server of the routes."""
    service = CompletionService(model, config)
    port = free_port()
    settings = uvicorn.Config(
        make_app(service, access), host="127.0.0.1", port=port, log_level="warning", lifespan="off"
    )
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            thread.join(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
        service.close()
