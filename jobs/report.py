"""Write report.html: one page with the curves, routing, specialisation, cost and events of a run.

usage: python jobs/report.py RUN [RUN ...] [out=FILE] [tokens=N]

RUN is the folder of a run or its s3:// or gs:// URI; one that still trains can be drawn too. The page of one run
is written into it, or to `out`; several runs are drawn over each other in a page that needs `out`. What is
missing, such as a checkpoint to analyse, the page says. It needs no network to be read. `tokens` of held-out text
are analysed, 16384 unless it is set: more find smaller effects, and take longer.
"""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jobs.cli import exit_on_error
from moe_ray.analytics.report.build import comparison_page, run_page
from moe_ray.analytics.report.page import render
from moe_ray.analytics.report.parts import Page
from moe_ray.analytics.report.run import Run, distinct_names, read_run
from moe_ray.config import TelemetryConfig
from moe_ray.cpu import keep_freed_memory, set_threads
from moe_ray.errors import ConfigError, MoeRayError
from moe_ray.storage import open_storage
from moe_ray.submission import lasting
from moe_ray.telemetry.logs import setup_logging
from moe_ray.telemetry.records import one_line

REPORT = "report.html"
_TOKENS = 1 << 14
_OPTION = re.compile(r"([A-Za-z_.]+)=(.*)", re.DOTALL)


@dataclass(frozen=True)
class Arguments:
    """Of the command line: runs, where the page goes (None: into the only run), and tokens to analyse."""

    runs: tuple[str, ...]
    out: str | None
    tokens: int


def parse(arguments: Sequence[str]) -> Arguments:
    """Runs and options.

    Raises:
        ConfigError: there is no run, `out` is missing, or an option is unknown or wrong.
    """
    options = {match[1]: match[2] for argument in arguments if (match := _OPTION.fullmatch(argument))}
    runs = tuple(argument for argument in arguments if not _OPTION.fullmatch(argument))
    for name in options.keys() - {"out", "tokens"}:
        raise ConfigError(f"{name!r} cannot be set for a report.", "use out=FILE or tokens=N.")
    out, tokens = options.get("out"), options.get("tokens", str(_TOKENS))
    if not runs:
        raise ConfigError("no run is given.", "give the folder of a run, or its s3:// or gs:// URI.")
    if out is None and len(runs) > 1:
        raise ConfigError(f"{len(runs)} runs have no folder in common.", f"say where the page goes: out={REPORT}.")
    if out is not None and not Path(out.partition("?")[0]).name:
        raise ConfigError(f"out={out!r} names no file.", f"write out=FOLDER/{REPORT}.")
    if not tokens.isdecimal() or not int(tokens):
        raise ConfigError(f"tokens={tokens!r} is not allowed.", "tokens is a positive integer.")
    return Arguments(runs, out, int(tokens))


def main(arguments: Sequence[str]) -> None:
    """Write the page, and print its summary and where it is."""
    given = parse(arguments)
    setup_logging(TelemetryConfig())
    keep_freed_memory()
    # A run may train on the same cores, and threads that wait for a busy core slow all others down.
    set_threads((os.cpu_count() or 1) / 2)
    page, place = make_report(given.runs, given.out, given.tokens)
    for finding in page.findings:
        print(one_line(finding.text))
    print(f"report {place}")


def make_report(runs: Sequence[str], out: str | None = None, tokens: int = _TOKENS) -> tuple[Page, str]:
    """Write the page of a run, or of several, and return it with its place.

    Raises:
        ConfigError: there is no such run, or `out` does not last.
        StorageError: a run cannot be read, or the page not be written.
    """
    folder, name = (runs[0], REPORT) if out is None else _split(out)
    drawn = [_with_samples(read_run(uri), uri) for uri in runs]
    if len(drawn) == 1:
        page = run_page(_with_analysis(drawn[0], runs[0], tokens))
    else:
        page = comparison_page(distinct_names(drawn))
    storage = open_storage(folder)
    storage.write(name, render(page))
    return page, str(storage.local / name) if storage.local is not None else f"{folder.partition('?')[0]}/{name}"


def _with_analysis(run: Run, uri: str, tokens: int) -> Run:
    """The run with what its newest checkpoints tell; a reason where they tell nothing."""
    # Only here: a wrong argument should be reported at once, and torch takes seconds.
    from moe_ray.analytics.analyse import Options, analyse

    try:
        return replace(run, analysis=analyse(uri, Options(max_tokens=tokens)))
    except MoeRayError as error:
        return replace(run, why_not=error.problem)


def _with_samples(run: Run, uri: str) -> Run:
    """The run with texts of its newest checkpoint, continuations of held-out ones."""
    from moe_ray.analytics.held_out import open_held_out, read_held_out
    from moe_ray.analytics.report.samples import first_texts, write_samples
    from moe_ray.checkpoint.inference import load_for_inference

    try:
        model = load_for_inference(uri)
        texts = first_texts(read_held_out(open_held_out(model, None), _TOKENS))
        return replace(run, samples=write_samples(model, texts))
    except MoeRayError as error:
        return replace(run, why_not=error.problem)


def _split(out: str) -> tuple[str, str]:
    """Folder and name of a file; a URI keeps its query."""
    if "://" not in out:
        path = lasting("out", out)
        return str(path.parent), path.name
    base, mark, query = out.partition("?")
    folder, _, name = base.rpartition("/")
    return f"{folder}{mark}{query}", name


if __name__ == "__main__":
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__.strip())
        sys.exit(0 if len(sys.argv) > 1 else 2)
    exit_on_error(lambda: main(sys.argv[1:]))
