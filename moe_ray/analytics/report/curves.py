"""Loss, perplexity, learning rate and gradient norm over steps."""

import numpy as np

from moe_ray.analytics.report.parts import Figure, Missing, Part, Table
from moe_ray.analytics.report.run import Run
from moe_ray.analytics.report.spec import Series, line_chart, short, was_thinned

ROWS = 25
_MOST_DOMAINS = 12


def loss_parts(run: Run) -> list[Part]:
    """Figures of the section on loss."""
    if run.steps is None:
        return [Missing("Loss", "The run has not logged a step yet.")]
    return [_loss(run), *_perplexity(run), _learning_rate(run), _grad_norm(run)]


def series_table(lines: list[Series]) -> Table:
    """Values of lines at some 25 steps, the first and the last among them."""
    steps = np.unique(np.concatenate([line.steps[np.isfinite(line.values)] for line in lines]))
    chosen = steps[np.unique(np.linspace(0, max(0, len(steps) - 1), min(len(steps), ROWS)).round().astype(int))]
    by_step = [dict(zip(line.steps.tolist(), line.values.tolist(), strict=True)) for line in lines]
    rows = [(int(step), *(short(values.get(step, np.nan)) for values in by_step)) for step in chosen.tolist()]
    note = "" if len(chosen) == len(steps) else f"{len(chosen)} of {len(steps):,} steps."
    return Table(("step", *(line.name for line in lines)), rows, note=note)


def _loss(run: Run) -> Figure:
    assert run.steps is not None
    steps = run.history.column("step")
    lines = [Series("training", steps, run.history.column("loss"))]
    if np.isfinite(run.history.column("val_loss")).any():
        lines.append(Series("held-out", steps, run.history.column("val_loss")))
    text = "Mean next-token loss of each logged step, and on held-out text where it was measured."
    spec = line_chart(lines, run.axis_marks, run.steps, y_title="loss (nats)")
    return Figure("loss", "Loss", text + was_thinned(lines), spec, series_table(lines))


def _perplexity(run: Run) -> list[Part]:
    assert run.steps is not None
    steps = run.history.column("step")
    whole = run.history.column("val_perplexity")
    if not np.isfinite(whole).any():
        reason = "The run has not evaluated yet: train.eval_every says at which steps it does."
        return [Missing("Held-out perplexity by domain", reason)]
    last = {name: values[np.isfinite(values)] for name, values in run.history.domains.items()}
    hardest = sorted(last, key=lambda name: -last[name][-1])[:_MOST_DOMAINS]
    domains = [Series(name, steps, run.history.domains[name]) for name in last if name in hardest]
    lines = [Series("all", steps, whole), *domains] if len(domains) != 1 else domains
    names = ", ".join(line.name for line in domains)
    text = f"Perplexity on held-out text of the domains {names}; the axis is logarithmic."
    if len(domains) < len(last):
        text += f" Of {len(last)} domains, these have the highest."
    spec = line_chart(lines, run.axis_marks, run.steps, y_title="perplexity", log=True)
    return [
        Figure("perplexity", "Held-out perplexity by domain", text + was_thinned(lines), spec, series_table(lines))
    ]


def _learning_rate(run: Run) -> Figure:
    assert run.steps is not None
    lines = [Series("learning rate", run.history.column("step"), run.history.column("lr"))]
    spec = line_chart(lines, run.axis_marks, run.steps, y_title="learning rate", zero=True, height=110)
    return Figure("learning-rate", "Learning rate", "Of each logged step.", spec, series_table(lines))


def _grad_norm(run: Run) -> Figure:
    assert run.steps is not None
    lines = [Series("gradient norm", run.history.column("step"), run.history.column("grad_norm"))]
    text = "Global norm of the gradient before it is clipped." + was_thinned(lines)
    spec = line_chart(lines, run.axis_marks, run.steps, y_title="gradient norm", zero=True, height=110)
    return Figure("gradient-norm", "Gradient norm", text, spec, series_table(lines))
