"""The page of a sweep: that it says what the trials say, whole in a browser, of damaged and empty sweeps too."""

import asyncio
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import vl_convert

from moe_ray.analytics.report.page import render
from moe_ray.analytics.report.parts import Figure, Missing, Page, Table
from moe_ray.config import build_config
from moe_ray.storage import open_storage
from moe_ray.sweep_config import Constraint
from moe_ray.tuning.board import Board
from moe_ray.tuning.changes import Change
from moe_ray.tuning.outcome import write_outcome
from moe_ray.tuning.report.build import sweep_page, write_sweep_page
from moe_ray.tuning.report.importance import importances
from moe_ray.tuning.report.trade import pareto_front
from moe_ray.tuning.trials import Trial
from tests.browser import opened
from tests.made_sweeps import STEPS, make_sweep, make_trials

EVIL = '</script><script>window.broken = true</script><img src=x onerror="window.broken = true">&<b>'


def figures(page: Page) -> dict[str, Figure]:
    return {part.id: part for section in page.sections for part in section.parts if isinstance(part, Figure)}


def table_of(page: Page, name: str) -> Table:
    (table,) = [part for section in page.sections for part in section.parts if getattr(part, "id", "") == name]
    assert isinstance(table, Table)
    return table


def finding(page: Page, name: str) -> str:
    """The sentence that links to a part of the page."""
    (text,) = [finding.text for finding in page.findings if finding.id == name]
    return text


def test_page_says_what_the_trials_say() -> None:
    sweep = make_sweep(make_trials(48))
    page = sweep_page(sweep)
    assert sweep.best is not None
    best = f"Trial {sweep.best.number} is the best: val_loss {sweep.best.metrics['val_loss']:.4g}"
    assert best in finding(page, "best")
    table = table_of(page, "trial-table")
    assert table.columns[:4] == ("trial", "val_loss", "status", "steps")
    assert {row[0] for row in table.rows} == set(range(48))
    values = [row[1] for row in table.rows if row[1] is not None]
    assert values == sorted(values)
    assert table.rows[0][0] == sweep.best.number


def test_best_is_compared_with_the_configuration() -> None:
    sweep = make_sweep(make_trials(48))
    best = sweep.best
    assert best is not None
    base = next(trial for trial in sweep.trials if trial.status == "finished" and trial != best)
    page = sweep_page(replace(sweep, configured=base.values))
    gain, was = base.metrics["val_loss"] - best.metrics["val_loss"], base.metrics["val_loss"]
    told = f"That is {gain:.2g} lower than {was:.4g} of trial {base.number}, as configured."
    assert told in finding(page, "best")
    table = next(part for part in page.sections[0].parts if isinstance(part, Table))
    assert table.columns == ("setting or metric", f"trial {best.number}", f"as configured (trial {base.number})")
    values = {row[0]: row[1:] for row in table.rows}
    assert values["optim.lr"] == (f"{best.values['optim.lr']:.4g}", f"{base.values['optim.lr']:.4g}")
    assert values["val_loss"] == (f"{best.metrics['val_loss']:.4g}", f"{was:.4g}")


def test_equal_is_neither_lower_nor_higher() -> None:
    sweep = make_sweep(make_trials(48))
    assert sweep.best is not None
    base = replace(sweep.best, number=48, values={"optim.lr": 1e-3})
    page = sweep_page(replace(sweep, trials=[*sweep.trials, base], configured=base.values))
    assert f"That is no other than {base.metrics['val_loss']:.4g} of trial 48, as" in finding(page, "best")


def test_page_tells_how_many_trials_are_to_come() -> None:
    sweep = make_sweep(make_trials(9))
    assert "A sweep of 9 trials for" in sweep_page(replace(sweep, most=9)).lead
    # A grid may have fewer than there may be.
    assert "A sweep of 9 trials for" in sweep_page(replace(sweep, most=16)).lead
    going = replace(sweep, trials=[*sweep.trials[1:], replace(sweep.trials[0], status="running")], most=16)
    assert "A sweep of 9 trials so far, of at most 16 for" in sweep_page(going).lead


def test_page_of_a_population_tells_what_took_over_what() -> None:
    sweep = make_sweep(make_trials(9))
    before, values = {"optim.lr": 1e-3, "model.top_k": 2}, {"optim.lr": 2e-3, "model.top_k": 2}
    change = Change(50, 3, 1, "trial-003-from-50", before, values)
    table = table_of(sweep_page(replace(sweep, changes=(change,))), "changes")
    assert table.rows == [(50, 3, 1, "optim.lr 0.001 → 0.002")]


def test_best_says_why_it_is_not_compared_with_the_configuration() -> None:
    sweep = make_sweep(make_trials(48))
    assert sweep.best is not None
    failed = next(trial for trial in sweep.trials if trial.status == "failed")
    for configured, told in (
        ({"optim.lr": 1.0}, "None ran as configured"),
        (sweep.best.values, "It is the configuration as it stands"),
        (failed.values, f"Trial {failed.number}, as configured, cannot be compared with it: it is failed"),
    ):
        assert told in finding(sweep_page(replace(sweep, configured=configured)), "best")


def test_page_says_what_the_trials_cost() -> None:
    trials = [
        replace(trial, metrics={**trial.metrics, "tokens": 1000.0 * trial.steps}, seconds=90.0)
        for trial in make_trials(48)
    ]
    page = sweep_page(make_sweep(trials))
    flops = {trial.number: (trial.flops_per_token or 0) * 1000 * trial.steps for trial in trials}
    lost = sum(flops[trial.number] for trial in trials if trial.status == "failed") / sum(flops.values())
    steps = sum(trial.steps for trial in trials)
    told = f"took 1:12:00 (h:min:s), {steps:,} steps and {sum(flops.values()):.3g} FLOPs, {lost:.0%} of them for"
    assert told in finding(page, "sweep-cost")
    rows = table_of(page, "sweep-cost").rows
    assert rows[-1] == ["all", 48, "1:12:00", f"{sum(flops.values()):.3g}", steps, 1000 * steps]
    assert [sum(row[column] for row in rows[:-1]) for column in (1, 4)] == [48, steps]


def test_page_says_why_trials_failed() -> None:
    trials = make_trials(48)
    trials[3] = replace(trials[3], reason="out of memory\n" + "x" * 1000)
    page = sweep_page(make_sweep(trials))
    failed = [trial.number for trial in trials if trial.status == "failed"]
    told = f"{len(failed)} of 48 trials failed, {len(failed) - 1} of them: a loss that is not finite"
    rows = table_of(page, "reasons").rows
    assert told in [finding.text for finding in page.findings if finding.id == "reasons"]
    assert rows[0] == ("failed", "a loss that is not finite", len(failed) - 1, ", ".join(map(str, failed[1:])))
    assert rows[1] == ("failed", trials[3].reason, 1, "3")
    assert rows[2][:2] == ("infeasible", "model.top_k=9")
    alone = make_sweep([replace(trials[3], number=0)])
    assert len(finding(sweep_page(alone), "reasons")) < 250


def test_what_keeps_to_the_bounds_comes_first() -> None:
    unbound = make_trials(24)
    front = pareto_front(make_sweep(unbound))
    trials = [
        replace(trial, metrics={**trial.metrics, "load_cv": 0.1 * (trial in front)}) if trial.metrics else trial
        for trial in unbound
    ]
    sweep = replace(make_sweep(trials), bounds=(Constraint("load_cv", "<=", 0.05),))
    page = sweep_page(sweep)
    table = table_of(page, "trial-table")
    assert "for the lowest val_loss, with load_cv <= 0.05, over" in page.lead
    assert table.columns[:3] == ("trial", "val_loss", "load_cv")
    within = [row[2] == 0 for row in table.rows]
    assert within == sorted(within, reverse=True)
    assert pareto_front(sweep)
    assert all(trial.metrics["load_cv"] == 0 for trial in pareto_front(sweep))


def test_front_needs_models_of_several_sizes() -> None:
    trials = [replace(trial, flops_per_token=2e7) for trial in make_trials(20)]
    page = sweep_page(make_sweep(trials))
    (missing,) = [part for section in page.sections for part in section.parts if isinstance(part, Missing)]
    assert missing.reason == "Every finished trial takes 2e+07 FLOPs a token: there is nothing to weigh."
    assert "pareto" not in [finding.id for finding in page.findings]


def test_steps_are_chosen_where_there_are_curves() -> None:
    trials = make_trials(20)
    assert sweep_page(make_sweep(trials)).steps == (0, STEPS)
    at_the_end = [replace(trial, history=trial.history[-1:]) for trial in trials]
    assert sweep_page(make_sweep(at_the_end)).steps is None


def test_one_is_no_plural() -> None:
    for steps, status in ((STEPS, "finished"), (1, "stopped")):
        (trial,) = make_trials(1)
        trial = replace(trial, status=status, steps=steps, history=((steps, 4.0),))
        page = sweep_page(replace(make_sweep([trial]), best=trial, configured={}))
        missing = [part.reason for section in page.sections for part in section.parts if isinstance(part, Missing)]
        told = " ".join([page.lead, *(finding.text for finding in page.findings), *missing])
        assert "A sweep of 1 trial for" in told
        assert not re.search(r"\b1 (\w+ )?(trials|steps)\b", told)


def test_stopped_trials_save_what_the_page_says() -> None:
    trials = make_trials(48)
    started = [trial for trial in trials if trial.steps]
    used, whole = sum(trial.steps for trial in started), len(started) * STEPS
    text = figures(sweep_page(make_sweep(trials)))["curves"].text
    assert f"Steps trained: {used:,}, {used / whole:.0%} of the {whole:,}" in text


def test_front_is_what_nothing_beats() -> None:
    sweep = make_sweep(make_trials(48))
    done = [trial for trial in sweep.trials if trial.status == "finished"]
    unbeaten = {
        trial.number
        for trial in done
        if not any(
            other.flops_per_token <= trial.flops_per_token and sweep.loss(other) < sweep.loss(trial)
            for other in done
        )
    }
    assert {trial.number for trial in pareto_front(sweep)} == unbeaten


def test_importance_finds_what_was_planted_and_no_more() -> None:
    found = importances(make_sweep(make_trials(48)))
    assert found[0].setting == "optim.lr"
    assert found[0].is_told
    assert "model.router" in [item.setting for item in found if not item.is_told]
    assert importances(make_sweep(make_trials(7))) == []
    low, high = map(float, found[0].best.split(" to "))
    assert low < 4e-3 < high
    bars = figures(sweep_page(make_sweep(make_trials(48))))["importance"].spec["data"]["values"]
    assert {bar["setting"]: bar["told"] for bar in bars} == {item.setting: item.is_told for item in found}


def test_importance_of_noise_is_told_no_more_often_than_promised() -> None:
    rng, told = np.random.default_rng(0), 0
    for _ in range(40):
        trials = [replace(trial, metrics={"val_loss": float(rng.random())}) for trial in make_trials(24)]
        told += any(item.is_told for item in importances(make_sweep(trials)))
    assert told <= 6, "5% of 40 sweeps are 2; more than 6 has a probability of 1%"


def test_settings_of_any_kind_have_a_place() -> None:
    mixed = [None, 1, 2.5, True, "a", [1, 2], {"type": "yarn"}, "x" * 300, math.inf, -3]
    trials = [
        replace(trial, values={**trial.values, "model.mixed": value})
        for trial, value in zip(make_trials(10), mixed, strict=True)
    ]
    points = figures(sweep_page(make_sweep(trials)))["parallel"].spec["layer"][1]["data"]["values"]
    places = {point["value"]: point["at"] for point in points if point["setting"] == "model.mixed"}
    assert places.pop("not set") > 1
    assert len(places) == len({*places.values()})
    learning_rates = {float(point["value"]): point["at"] for point in points if point["setting"] == "optim.lr"}
    logs = {rate: (math.log(rate) - math.log(min(learning_rates))) for rate in learning_rates}
    for rate, at in learning_rates.items():
        assert at == pytest.approx(logs[rate] / max(logs.values()), abs=2e-3)


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_small_sweeps_have_a_page(count: int) -> None:
    page = sweep_page(make_sweep(make_trials(count)))
    reasons = {part.title for section in page.sections for part in section.parts if isinstance(part, Missing)}
    assert ("Best trial" in reasons) == (count == 0)
    assert ("Importance of the settings" in reasons) == (count < 9)
    assert render(page)


def test_trials_without_numbers_have_a_page() -> None:
    bare = [Trial(number, f"trial-{number}", {}, status="pending") for number in range(3)]
    broken = Trial(
        3,
        "trial-3",
        {"optim.lr": 1e-3},
        "finished",
        steps=5,
        metrics={"val_loss": math.nan, "tokens": math.nan},
        history=((5, math.nan),),
    )
    halved = Trial(4, "trial-4", {"data.domain": "cut \ud83d"}, "failed", reason="cut \ud83d", steps=5)
    page = sweep_page(make_sweep([*bare, broken, halved]))
    assert {row[1] for row in table_of(page, "trial-table").rows} == {None}
    assert render(page)


def test_more_of_an_objective_can_be_better() -> None:
    trials = make_trials(20)
    highest = replace(make_sweep(trials), lowest=False)
    page = sweep_page(highest)
    values = [row[1] for row in table_of(page, "trial-table").rows if row[1] is not None]
    assert values == sorted(values, reverse=True)


def test_large_sweeps_stay_small(tmp_path: Path) -> None:
    write_sweep_page(open_storage(str(tmp_path)), make_sweep(make_trials(2000)))
    assert (tmp_path / "sweep.html").stat().st_size < 5_000_000


def test_every_figure_is_valid() -> None:
    for figure in figures(sweep_page(make_sweep(make_trials(20)))).values():
        vl_convert.vegalite_to_vega(json.dumps(figure.spec))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_page_is_whole_in_a_browser(width: int, scheme: str, tmp_path: Path) -> None:
    trials = make_trials(30)
    trials[3] = replace(trials[3], reason=EVIL, values={**trials[3].values, EVIL: EVIL})
    trials[8] = replace(trials[8], reason="no room " * 200)
    write_sweep_page(open_storage(str(tmp_path)), make_sweep(trials, EVIL))

    async def look() -> None:
        async with opened(tmp_path / "sweep.html", width, scheme=scheme) as tab:
            marks = await tab.evaluate(
                "Object.fromEntries([...document.querySelectorAll('.chart')].map(c => [c.dataset.figure, "
                "c.querySelectorAll('svg [class*=mark-] :is(path, text, line, rect)').length]))"
            )
            assert marks.keys() == {"parallel", "importance", "pareto", "curves"}
            assert min(marks.values()) > 3
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert await tab.evaluate(overflow) == 0
            assert await tab.evaluate("window.broken") is None
            assert tab.errors == []
            assert tab.requests == []

    asyncio.run(look())


def test_outcome_of_a_sweep_knows_its_configuration(tmp_path: Path) -> None:
    space = {"optim.lr": {"loguniform": [1e-4, 1e-1]}}
    sweep = {"space": space, "first": [{}], "constraints": ["load_cv <= 0.5"], "scheduler": "none"}
    board = Board(build_config({"sweep": sweep, "train": {"steps": STEPS}}), open_storage(str(tmp_path)))
    first, second = [trial for trial in make_trials(9) if trial.status == "finished"][:2]
    better = {**first.metrics, "val_loss": first.metrics["val_loss"] - 0.25}
    board.put(
        replace(first, values={"optim.lr": board.config.optim.lr}),
        replace(second, values={"optim.lr": 2e-3}, metrics=better),
    )
    write_outcome(board)
    told = f"That is 0.25 lower than {first.metrics['val_loss']:.4g} of trial {first.number}, as configured."
    page = (tmp_path / "sweep.html").read_text()
    assert told in page
    assert "with load_cv &lt;= 0.5, over optim.lr." in page


def crowded(count: int) -> list[Trial]:
    """Trials with settings whose values lie close together, or are many, and long."""
    rng = np.random.default_rng(1)
    close, names = [0.95, 0.98, 0.99, 0.995, 0.999], [f"a-rather-long-name-{number}" for number in range(6)]
    return [
        replace(
            trial,
            values={
                **trial.values,
                "optim.beta2": float(rng.choice(close)),
                "train.global_batch": int(rng.choice([4, 5, 8, 16, 64])),
                "model.router": str(rng.choice(names)),
                "model.load_balancing_loss_weight": float(rng.uniform(3e-3, 1e-1)),
            },
        )
        for trial in make_trials(count)
    ]


_OVERLAPS = """(() => {
  const boxes = [...document.querySelectorAll('[data-figure=parallel] [class*=halo_] text')]
    .map((text) => [text.textContent, text.getBoundingClientRect()]);
  const meet = (a, b) => a.left < b.right && b.left < a.right && a.top < b.bottom - 1 && b.top < a.bottom - 1;
  return {
    count: boxes.length,
    meeting: boxes.filter(([_, a], i) => boxes.slice(i + 1).some(([_, b]) => meet(a, b))).map(([one]) => one),
    outside: boxes.filter(([_, a]) => a.left < 0 || a.right > innerWidth).map(([one]) => one),
  };
})()"""
_BARS = """[...document.querySelectorAll('[data-figure=importance] .mark-rect path')].map((bar) =>
  [getComputedStyle(bar).fillOpacity, bar.getAttribute('stroke')])"""
_SCROLLED = """(() => {
  const region = document.querySelector('#trial-table .scroll');
  region.scrollLeft = 150;
  const cell = region.querySelector('tbody td');
  return {
    hidden: region.scrollWidth - region.clientWidth,
    moved: region.scrollLeft,
    number: cell.getBoundingClientRect().left - region.getBoundingClientRect().left,
    shades: getComputedStyle(region).backgroundAttachment.split(', ').join(' '),
    rows: Math.max(...[...region.querySelectorAll('tbody tr')].map((row) => row.offsetHeight)),
  };
})()"""


def test_page_can_be_read_on_a_phone_and_on_paper(tmp_path: Path) -> None:
    trials = crowded(48)
    trials[3] = replace(trials[3], reason="no room " * 200)
    sweep = make_sweep(trials)
    write_sweep_page(open_storage(str(tmp_path)), sweep)

    async def look() -> None:
        async with opened(tmp_path / "sweep.html", 390) as tab:
            labels = await tab.evaluate(_OVERLAPS)
            assert labels["count"] > 20
            assert labels["meeting"] == labels["outside"] == []
            bars = await tab.evaluate(_BARS)
            told = [item.is_told for item in importances(sweep)]
            assert {True, False} == {*told}
            assert [opacity == "1" for opacity, _ in bars] == told
            assert all(stroke.startswith("#") for _, stroke in bars)
            scrolled = await tab.evaluate(_SCROLLED)
            assert scrolled["hidden"] > scrolled["moved"] > 100
            assert scrolled["number"] == 0, "the trial's number stays in view"
            assert scrolled["rows"] < 40
            assert scrolled["shades"].split() == ["local"] * 4 + ["scroll"] * 4
            await tab.call("Emulation.setEmulatedMedia", media="print")
            await tab.call(
                "Emulation.setDeviceMetricsOverride", width=680, height=900, deviceScaleFactor=1, mobile=False
            )
            paper = await tab.evaluate(_SCROLLED)
            assert paper["hidden"] == paper["moved"] == 0
            assert paper["rows"] < 16, "no number is broken"

    asyncio.run(look())
