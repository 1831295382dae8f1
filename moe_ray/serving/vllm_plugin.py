"""A plugin of vLLM, called in all its processes: its engine ends with the process that holds `VllmEngine`."""

import ctypes
import os
import signal

# The id of that process.
OWNER = "MOE_RAY_VLLM_OWNER"
# Of <linux/prctl.h>.
_PR_SET_PDEATHSIG = 1


def end_with_owner() -> None:
    """Have this process told to end when its parent dies, if that is the owner; its workers see it end themselves.

    vLLM's engine waits for messages forever, and so keeps its memory, when the process that sends them is killed.
    """
    if os.environ.get(OWNER) == str(os.getppid()) and ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM):
        raise OSError("the kernel does not tell of the death of the parent")
