"""Ray Train's TorchTrainer with the elastic controller, and signals that save before they end."""

import logging
import signal
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2.torch.torch_trainer import TorchTrainer

from moe_ray.config import Config
from moe_ray.submission import read_submission
from moe_ray.training.elastic import ElasticController

_logger = logging.getLogger(__name__)


class ElasticTrainer(TorchTrainer):
    """Trains with as many workers as there is room for; SIGINT and SIGTERM of the driver save first."""

    def __init__(self, *arguments: Any, config: Config, **rest: Any) -> None:
        self._settings = config.model_dump(mode="json")
        super().__init__(*arguments, **rest)

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        # The controller makes policies of its own.
        arguments.pop("scaling_policy")
        arguments.pop("failure_policy")
        node = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}  # ty: ignore
        # Blocking calls in the controller are Ray Train's own way; it silences the warning likewise.
        environment = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0"} | get_env_vars_to_propagate()
        remote = ray.remote(num_cpus=0, label_selector=node, runtime_env={"env_vars": environment})(
            ElasticController
        )
        controller: Any = remote.remote(settings=self._settings, submission=read_submission(), **arguments)
        with _stop_on_signals(controller):
            ray.get(controller.run.remote())
            return ray.get(controller.get_result.remote())


@contextmanager
def _stop_on_signals(controller: Any) -> Generator[None]:
    """The first signal asks the workers to save and end; a Ctrl-C after it ends the program.

    A second SIGTERM is no impatience, which supervisors tell by SIGKILL: `ray job stop` signals all processes of a
    job, and a chaos job passes the signal on to the training that it runs.
    """
    has_asked = False

    def stop(number: int, frame: Any) -> None:
        nonlocal has_asked
        if not has_asked:
            has_asked = True
            name = signal.Signals(number).name
            _logger.warning("%s: saving a checkpoint, then ending; Ctrl-C to end at once", name)
            controller.stop.remote()
        elif number == signal.SIGINT:
            signal.default_int_handler(number, frame)

    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
