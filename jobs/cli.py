"""What every job shares: arguments, exit codes and the one line an error becomes."""

import os
import sys
from collections.abc import Callable, Sequence

from moe_ray.config import Config, describe_settings, load_config
from moe_ray.errors import MoeRayError


def run_job(usage: str, main: Callable[[Config], None], arguments: Sequence[str] | None = None) -> None:
    """Run `main(config)` for `CONFIG [section.field=value ...]` and exit: 0 success, 2 user error, 1 otherwise.

    Args:
        usage: the job's docstring, printed by `--help` above the list of settings.
        main: the job.
        arguments: the command line without the program; default `sys.argv[1:]`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(f"{usage.strip()}\n\nsettings:\n{describe_settings()}")
        sys.exit(0 if arguments else 2)
    exit_on_error(lambda: main(load_config(arguments[0], arguments[1:])))


def exit_on_error(action: Callable[[], None]) -> None:
    """Run `action`; one of our errors becomes a line on stderr and its exit code.

    Modules in the working directory can be imported, as Ray's workers can: a user's own router may stand there.
    """
    sys.path.append(os.getcwd())
    try:
        action()
    except MoeRayError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
