"""Run a job on a local cluster through Ray's job server."""

import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cluster.head import Head
from cluster.local import ClusterError, LocalCluster
from moe_ray.errors import MoeRayError

_SUBMIT_SECONDS = 180
_POLL_SECONDS = 0.5


class JobError(MoeRayError):
    """A job ended without success."""


def submit_command(script: Sequence[str], job_id: str) -> list[str]:
    """What a user would type to submit a script from the current folder."""
    return ["ray", "job", "submit", "--no-wait", "--working-dir", ".", "--submission-id", job_id, "--", *script]


def submit(cluster: LocalCluster, command: Sequence[str], working_dir: Path) -> None:
    """Run a `ray job submit` command; the cluster's environment has been set.

    Raises:
        ClusterError: the job server did not take the job.
    """
    result = subprocess.run(
        [str(Path(sys.executable).with_name("ray")), *command[1:]],
        cwd=working_dir,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_SUBMIT_SECONDS,
        check=False,
    )
    if result.returncode != 0:
        said = (result.stdout + result.stderr).strip().splitlines() or ["nothing"]
        raise ClusterError(f"`ray job submit` failed; it said last: {said[-1]}.", f"see {cluster.log_file}.")


def await_job(cluster: LocalCluster, head: Head, job_id: str, log_file: Path, poll: Callable[[], None]) -> None:
    """Wait for a job to end and write its log to a file.

    Args:
        poll: called again and again while it runs.

    Raises:
        JobError: it ended without success.
    """
    while (job := cluster.get(head, f"/api/jobs/{job_id}"))["status"] in ("PENDING", "RUNNING"):
        poll()
        time.sleep(_POLL_SECONDS)
    log = cluster.get(head, f"/api/jobs/{job_id}/logs")["logs"]
    log_file.parent.mkdir(parents=True, exist_ok=True)
    log_file.write_text(f"{log.rstrip()}\n{job['message'] or ''}\n", encoding="utf-8")
    if job["status"] != "SUCCEEDED":
        # The job's own error if it printed one, else what Ray says, which can be pages.
        errors = [line.removeprefix("error: ") for line in log.splitlines() if line.startswith("error: ")]
        reason = errors[-1] if errors else textwrap.shorten(str(job["message"]), 300, placeholder=" …")
        problem, _, fix = reason.partition(" Fix: ")
        raise JobError(f"job {job_id} has {job['status']}: {problem}", f"{fix} See its log, {log_file}.".lstrip())
