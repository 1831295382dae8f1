"""The page of a sweep: that it says what the trials say, whole in a browser, of damaged and empty sweeps too."""

import asyncio
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import vl_convert

from moe_ray.analytics.report.page import render
from moe_ray.analytics.report.parts import Figure, Missing, Page, Table
from moe_ray.storage import open_storage
from moe_ray.tuning.report.build import sweep_page, write_sweep_page
from moe_ray.tuning.report.importance import importances
from moe_ray.tuning.report.trade import pareto_front
from moe_ray.tuning.trials import Trial
from tests.browser import opened
from tests.made_sweeps import STEPS, make_sweep, make_trials

EVIL = '</script><script>window.broken = true</script><img src=x onerror="window.broken = true">&<b>'


def figures(page: Page) -> dict[str, Figure]:
    return {part.id: part for section in page.sections for part in section.parts if isinstance(part, Figure)}


def trial_table(page: Page) -> Table:
    (table,) = [
        part for section in page.sections for part in section.parts if getattr(part, "id", "") == "trial-table"
    ]
    assert isinstance(table, Table)
    return table


def test_page_says_what_the_trials_say() -> None:
    sweep = make_sweep(make_trials(48))
    page = sweep_page(sweep)
    assert sweep.best is not None
    (best,) = [finding.text for finding in page.findings if finding.id == "best"]
    assert f"Trial {sweep.best.number} is the best: val_loss {sweep.best.metrics['val_loss']:.4g}" in best
    table = trial_table(page)
    assert table.columns[:4] == ("trial", "val_loss", "status", "steps")
    assert {row[0] for row in table.rows} == set(range(48))
    values = [row[1] for row in table.rows if row[1] is not None]
    assert values == sorted(values)
    assert table.rows[0][0] == sweep.best.number
    reasons = {row[0]: row[-1] for row in table.rows}
    assert all(reasons[trial.number] == trial.reason for trial in sweep.trials)


def test_stopped_trials_save_what_the_page_says() -> None:
    trials = make_trials(48)
    started = [trial for trial in trials if trial.steps]
    used, whole = sum(trial.steps for trial in started), len(started) * STEPS
    text = figures(sweep_page(make_sweep(trials)))["curves"].text
    assert f"{used:,} steps were trained, {used / whole:.0%} of the {whole:,}" in text


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
        3, "trial-3", {"optim.lr": 1e-3}, "finished", metrics={"val_loss": math.nan}, history=((5, math.nan),)
    )
    page = sweep_page(make_sweep([*bare, broken]))
    assert {row[1] for row in trial_table(page).rows} == {None}
    assert render(page)


def test_more_of_an_objective_can_be_better() -> None:
    trials = make_trials(20)
    highest = replace(make_sweep(trials), lowest=False)
    values = [row[1] for row in trial_table(sweep_page(highest)).rows if row[1] is not None]
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
