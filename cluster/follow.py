"""Print the log of a submitted job while it runs, and exit with the job's own code.

usage: python -m cluster.follow SUBMISSION_ID

`ray job submit` exits with 1 for any failure, and with 0 if the job was stopped. This exits with what the program
exited with: 0 success, 2 user error; and with 1 if it was stopped or never ran. Ctrl-C leaves the job alone. The
cluster is that of RAY_API_SERVER_ADDRESS, or of RAY_ADDRESS.
"""

import asyncio
import logging
import re
import sys
from typing import Any

from cluster.job import JobError
from jobs.cli import exit_on_error
from moe_ray.errors import ConfigError


def main(submission_id: str) -> int:
    """Follow until the job ends; returns its exit code.

    Raises:
        ConfigError: there is no such job, or no cluster.
        JobError: the connection was lost before the end.
    """
    if not re.fullmatch(r"(?!\.+$)[^\s/?#%]+", submission_id):
        raise ConfigError(f"{submission_id!r} is no submission id.", "`ray job list` names those that there are.")
    # Here, so that the help needs no Ray.
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)

    try:
        client: Any = JobSubmissionClient()
        client.get_job_status(submission_id)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"job {submission_id!r} cannot be found: {str(error).strip().splitlines()[0].rstrip('.')}.",
            "set RAY_API_SERVER_ADDRESS to its cluster's dashboard; `ray job list` names its jobs.",
        ) from None
    try:
        asyncio.run(_print_log(client, submission_id))
        job = client.get_job_info(submission_id)
    except (OSError, RuntimeError) as error:
        raise _lost(submission_id, str(error)) from None
    if not job.status.is_terminal():
        raise _lost(submission_id, "it was closed")
    print(f"job {submission_id} {job.status.lower()}", file=sys.stderr)
    return 1 if job.driver_exit_code is None else job.driver_exit_code


async def _print_log(client: Any, submission_id: str) -> None:
    async for text in client.tail_job_logs(submission_id):
        print(text, end="", flush=True)


def _lost(submission_id: str, reason: str) -> JobError:
    return JobError(
        f"the connection to the cluster was lost, and job {submission_id} may go on: {reason}.",
        "run the same command again.",
    )


if __name__ == "__main__":
    if len(sys.argv) != 2 or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit(0 if {"-h", "--help"} & set(sys.argv[1:]) else 2)
    exit_on_error(lambda: sys.exit(main(sys.argv[1])))
