"""How many replicas of a deployment run, as its replicas know it."""

import logging
import threading
import time

from ray import serve
from ray.serve.schema import ReplicaState

_SECONDS = 5.0
_logger = logging.getLogger(__name__)


class ReplicaCount:
    """Asks Serve every few seconds: the context of an autoscaled replica always says 1 (Ray 2.60).

    It asks in a thread, which is to be started where somebody wants to know, as each answer costs milliseconds.

    Args:
        most: what is believed until Serve has answered.
    """

    def __init__(self, most: int) -> None:
        self._count = most
        self._context = serve.get_replica_context()

    def __call__(self) -> int:
        """The replicas that ran or were about to at the last look."""
        return self._count

    def start(self) -> None:
        """Look from now on."""
        threading.Thread(target=self._watch, name="replica-count", daemon=True).start()

    def _watch(self) -> None:
        while True:
            try:
                application = serve.status().applications[self._context.app_name]
                states = application.deployments[self._context.deployment].replica_states
                self._count = max(sum(states.values()) - states.get(ReplicaState.STOPPING, 0), 1)
            except Exception as error:
                # The controller restarts; the last count serves until it is back.
                _logger.warning("the replicas cannot be counted now: %s", error)
            time.sleep(_SECONDS)
