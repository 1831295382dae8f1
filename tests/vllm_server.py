"""An endpoint on vLLM, run in its environment: `python -m tests.vllm_server FOLDER PORT [FIELD=VALUE …]`."""

import signal
import sys

import uvicorn

from moe_ray.config import build_config
from moe_ray.cpu import set_threads
from moe_ray.errors import MoeRayError
from moe_ray.serving.app import make_app
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.load_to_serve import load_to_serve


def main(folder: str, port: str, *fields: str) -> None:
    """Serve until the process is told to end."""
    config = build_config({}, [f"serve.{field}" for field in ("engine=vllm", *fields)]).serve
    set_threads(1)
    # uvicorn sends itself the signal again when it has ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    service = CompletionService(load_to_serve(folder, config), config)
    try:
        uvicorn.run(make_app(service), host="127.0.0.1", port=int(port), log_level="warning")
    finally:
        service.close()


# vLLM's process imports this file again.
if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except MoeRayError as error:
        sys.exit(f"{type(error).__name__}: {error}")
