"""Which runner computes a model."""

import logging
from typing import Literal

from moe_ray.errors import ConfigError
from moe_ray.models.transformer import Transformer
from moe_ray.native.build import NativeUnavailableError
from moe_ray.serving.engine.cache import KVCache
from moe_ray.serving.engine.native_runner import NativeRunner, unsupported
from moe_ray.serving.engine.runner import Runner, TorchRunner

RunnerKind = Literal["auto", "native", "torch"]

_logger = logging.getLogger(__name__)


def make_runner(model: Transformer, cache: KVCache, kind: RunnerKind = "auto") -> Runner:
    """The runner for this model and its device.

    Args:
        kind: `auto` takes the C++ one where there is a compiler and it knows the architecture, else torch.

    Raises:
        ConfigError: the native one is asked for and cannot be had.
    """
    if kind == "torch":
        return TorchRunner(model, cache)
    reason = unsupported(model)
    if reason is None:
        try:
            return NativeRunner(model, cache)
        except NativeUnavailableError as error:
            reason = str(error)
    if kind == "native":
        raise ConfigError(f"serve.runner=native is not to be had: {reason}.", "use serve.runner=auto.")
    _logger.info("the model runs in torch: no native code for %s", reason)
    return TorchRunner(model, cache)
