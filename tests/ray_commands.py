"""Whether Ray's command line understands a command, without running it."""

from collections.abc import Sequence

import click
from ray.scripts.scripts import cli


def check_ray(words: Sequence[str]) -> None:
    """Parse `ray …`; an unknown command, option or value raises a click.ClickException."""
    program, *rest = words
    assert program == "ray"
    command: click.Command = cli
    while isinstance(command, click.Group):
        name, *rest = rest
        found = command.get_command(click.Context(command), name)
        assert found is not None, f"ray knows no {name}"
        command = found
    command.make_context(command.name or "", list(rest))
