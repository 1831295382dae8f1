"""Make an API key: prints the key, which is stored nowhere, and the line for serve.api_keys_file.

The line may go on with the key's limits, REQUESTS_PER_MINUTE [TOKENS_PER_MINUTE]: see docs/security.md.

usage: python jobs/api_key.py NAME
"""

import sys

from jobs.cli import exit_on_error
from moe_ray.serving.api_keys import make_key


def main() -> None:
    """Run the job."""
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print((__doc__ or "").strip())
        sys.exit(0 if {"-h", "--help"} & set(sys.argv) else 2)
    exit_on_error(lambda: _print(sys.argv[1]))


def _print(name: str) -> None:
    key, line = make_key(name)
    print(f"key:  {key}\nline: {line}")


if __name__ == "__main__":
    main()
