"""`jobs/train.py` as a process that can be killed and started again."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

_SCRIPT = Path(__file__).resolve().parents[3] / "jobs" / "train.py"
_GRACE_SECONDS = 20


class TrainJob:
    """A training driver and its command.

    Args:
        arguments: of `jobs/train.py`.
        environment: all variables of the process.
        log_file: what it prints is added there.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log_file: Path) -> None:
        self._command = [sys.executable, str(_SCRIPT), *arguments]
        self._environment = environment
        self.log_file = log_file
        self._process = self._start()

    @property
    def pid(self) -> int:
        """Of the driver that runs now or ran last."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def restart(self) -> None:
        """Kill the driver and run the same command again."""
        self._process.kill()
        self._process.wait()
        self._process = self._start()

    def end(self) -> None:
        """Let it save and end, or kill it if that takes long; nothing happens if it has ended."""
        self._process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        self._process.kill()
        self._process.wait()

    def last_words(self) -> str:
        """The last line that it printed."""
        lines = self.log_file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing"

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log_file.open("ab") as log:
            return subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # A Ctrl-C in the terminal is for the chaos job, which ends this one.
                start_new_session=True,
            )
