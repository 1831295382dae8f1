"""The page of a run: what it says, that text stays text, that it is whole in a browser and stays small."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import vl_convert

from jobs.report import main, make_report, parse
from moe_ray.analytics.report.build import comparison_page, run_page
from moe_ray.analytics.report.page import render
from moe_ray.analytics.report.parts import Figure, Missing, Page, Sample
from moe_ray.analytics.report.run import Run, distinct_names, read_run
from moe_ray.config import build_config
from moe_ray.errors import ConfigError
from moe_ray.storage import open_storage
from moe_ray.telemetry.history import read_history
from tests.analyses import make_analysis
from tests.browser import opened
from tests.made_runs import START, metrics_line, restarted, write_run
from tests.tiny import copy_corpus, tiny_settings
from tests.tiny import run as train

MOST_BYTES = 5_000_000
EVIL = '</script><script>window.broken = true</script><img src=x onerror="window.broken = true">&<b>'


def full(folder: Path) -> Run:
    """A run of which everything is known."""
    run = read_run(str(restarted(folder)))
    return replace(
        run, analysis=make_analysis(layers=2, experts=4), samples=[Sample("code", "def ", "f(x):\n  x")]
    )


def figures(page: Page) -> dict[str, Figure]:
    return {part.id: part for section in page.sections for part in section.parts if isinstance(part, Figure)}


def missing(page: Page) -> dict[str, str]:
    found = [part for section in page.sections for part in section.parts if isinstance(part, Missing)]
    return {part.title: part.reason for part in found}


class Tags(HTMLParser):
    """The tags of a page, and the text of its scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "script" and self.scripts:
            self.scripts[-1] += data


def test_history_leaves_out_what_a_crash_left(tmp_path: Path) -> None:
    run = write_run(tmp_path, [metrics_line(step) for step in (1, 2, 3)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo\n[1]\n' + json.dumps(metrics_line(5, val_loss=4.5)) + '\n{"step": 6, "loss"')
    history = read_history(open_storage(run))
    assert history.column("step").tolist() == [1, 2, 3, 5]
    assert history.damaged == 3
    assert history.last("val_loss") == 4.5
    assert history.last("of_another_version") is None


def test_history_keeps_layers_of_steps_that_are_evenly_spread(tmp_path: Path) -> None:
    run = write_run(tmp_path, [metrics_line(step) for step in range(1, 102)])
    history = read_history(open_storage(run), most_layers=11)
    assert (history.layers_M + 1).tolist() == list(range(1, 102, 10))
    assert history.load_MLE is not None
    assert np.allclose(history.load_MLE[3], metrics_line(31)["load_by_layer"])
    assert history.by_layer["load_cv"][-1].tolist() == metrics_line(101)["load_cv_by_layer"]


def test_summary_answers_with_pictures(tmp_path: Path) -> None:
    run = full(tmp_path)
    page = run_page(run)
    sentences = {finding.id: finding.text for finding in page.findings}
    assert page.lead.endswith("analysed on 20,000 tokens of held-out text.")
    assert run.history.load_MLE is not None
    worst = int(run.history.by_layer["load_cv"][-1].argmax())
    busiest = int(run.history.load_MLE[-1, worst].argmax())
    assert sentences["load"].startswith(f"Layer {worst} has the least balanced experts")
    assert f"Its expert {busiest} gets" in sentences["load"]
    assert "4 of 8 experts prefer a domain significantly" in sentences["by-domain"]
    assert "backward 55%, forward 33%, expert dispatch 11%" in sentences["time-shares"]
    assert sentences["timeline"] == (
        "It restarted once: from step 8 (4 steps done again) after a failure of rank 1: its process or node died."
    )
    assert sentences.keys() <= figures(page).keys()


def test_events_stand_at_the_steps_that_were_kept(tmp_path: Path) -> None:
    page = run_page(full(tmp_path))
    layers = figures(page)["loss"].spec["layer"]
    assert "Stalled warning: no step." in str(page)
    (marks,) = {json.dumps(layer["data"]["values"]) for layer in layers[1:]}
    assert [(mark["step"], mark["letter"]) for mark in json.loads(marks)] == [(0, "S"), (8, "FS"), (18, "A")]


def test_restarts_that_logged_no_step_count_and_steps_that_were_not_logged_may_be_done_again(
    tmp_path: Path,
) -> None:
    events: list[dict] = [{"event": "start", "time": START, "workers": 2}]
    for time in (25, 50, 60):
        failure = {"event": "failure", "time": START + time, "reason": "lost", "ranks": [0], "saved_step": 20}
        events += [failure, {"event": "start", "time": START + time + 5, "workers": 2}]
    again = {"resumed_step": 20, "redone_steps": 0}
    lines = [metrics_line(10), metrics_line(20), metrics_line(30, time=START + 80, **again)]
    run = write_run(tmp_path, lines, events, log_every=10)
    page = run_page(read_run(str(run)))
    (text,) = [finding.text for finding in page.findings if finding.id == "timeline"]
    lost = "from step 20 (it logged no step) after a failure of rank 0: lost"
    last = "from step 20 (up to 9 steps done again) after a failure of rank 0: lost"
    assert text == f"It restarted 3 times: {lost}; {lost}; {last}."
    assert "went on from step 20; up to 9 steps done again" in str(page)
    (run / "events.jsonl").unlink()
    assert "It restarted once: from step 20 (up to 9" in str(run_page(read_run(str(run))).findings)


def test_alerts_come_first_in_the_summary(tmp_path: Path) -> None:
    alert = {"event": "alert", "severity": "critical", "labels": {"run": "a"}, "action": "raise the weight."}
    collapse = {**alert, "alert": "ExpertCollapse", "summary": "its worst layer has 0.73 of the largest imbalance"}
    events = [
        {**alert, "time": START + 5, "alert": "LossRising", "summary": "the loss rises"},
        {**alert, "time": START + 8, "alert": "LossRising", "summary": "the loss rises", "event": "resolved"},
        {**collapse, "time": START + 12},
    ]
    run = write_run(tmp_path / "run", [metrics_line(step) for step in range(1, 21)], events)
    told = (
        "ExpertCollapse (critical) at step 12: its worst layer has 0.73 of the largest imbalance. It has not "
        "resolved. What helps: raise the weight."
    )
    page = run_page(read_run(str(run)))
    assert page.findings[0].text == told
    assert "LossRising (critical) at step 5: the loss rises. It resolved at step 8." in page.findings[1].text
    sound = write_run(tmp_path / "sound", [metrics_line(1)])
    both = comparison_page([read_run(str(sound)), read_run(str(run))])
    assert (both.findings[0].text, both.findings[0].id) == (f"run: {told}", "events-2")
    assert missing(both)["Events"].startswith("None")


def test_collapse_without_an_alert_is_told(tmp_path: Path) -> None:
    lines = [metrics_line(step, collapse_by_layer=[0.2, ratio]) for step, ratio in ((1, 0.9), (2, 0.8))]
    page = run_page(read_run(str(write_run(tmp_path / "run", lines))))
    assert page.findings[0].text.startswith("The experts have collapsed: layer 1 has 0.80 of the largest")
    assert "load_balancing_loss_weight" in page.findings[0].text
    healed = [*lines, metrics_line(3, collapse_by_layer=[0.2, 0.6])]
    page = run_page(read_run(str(write_run(tmp_path / "healed", healed))))
    assert "collapsed" not in str(page.findings)


def test_events_are_told_in_sentences(tmp_path: Path) -> None:
    alert = {"event": "alert", "alert": "DiskFull", "severity": "warning", "summary": "the disk fills"}
    events = [
        {"event": "job", "time": START, "submission": "wiki-1", "metadata": {"team": "nlp"}},
        {"event": "start", "time": START, "workers": 1},
        {"event": "failure", "time": START + 1, "reason": "No space left on device.", "ranks": [0]},
        {"event": "start", "time": START + 2, "workers": 2},
        {**alert, "time": START + 3, "action": "free some."},
    ]
    run = read_run(str(write_run(tmp_path, [metrics_line(1, dead_experts=1)], events)))
    assert [mark.text for mark in run.marks] == [
        "job wiki-1 trains; team nlp",
        "1 worker starts",
        "a failure of rank 0: No space left on device",
        "2 workers start",
        "DiskFull warning: the disk fills. What helps: free some.",
    ]
    text = str(run_page(run).findings)
    assert "device." in text
    assert "device.." not in text
    assert "1 expert had no token" in text


def test_axes_of_time_tell_seconds_of_short_runs(tmp_path: Path) -> None:
    def label(seconds: float) -> str:
        lines = [metrics_line(1), metrics_line(2, time=START + seconds)]
        page = run_page(read_run(str(write_run(tmp_path / str(seconds), lines))))
        return figures(page)["timeline"].spec["layer"][0]["encoding"]["x"]["axis"]["format"]

    assert [label(seconds) for seconds in (60, 7200, 200_000)] == ["%H:%M:%S", "%H:%M", "%m-%d %H:%M"]


def test_collapse_is_measured_against_always_the_same_choices(tmp_path: Path) -> None:
    run = write_run(tmp_path, [metrics_line(1)])
    assert (
        "1.73 (always the same 2 of 8 experts) is collapse"
        in figures(run_page(read_run(str(run))))["load-cv"].text
    )


def test_letters_of_close_events_are_one(tmp_path: Path) -> None:
    starts = [
        {"event": kind, "time": START + time} for time, kind in ((50, "failure"), (51, "start"), (90, "drain"))
    ]
    run = write_run(tmp_path, [metrics_line(step) for step in range(1, 101)], starts, steps=100)
    rules, letters = figures(run_page(read_run(str(run))))["loss"].spec["layer"][1:]
    assert [mark["step"] for mark in rules["data"]["values"]] == [50, 51, 90]
    assert [(mark["step"], mark["letter"]) for mark in letters["data"]["values"]] == [(50, "FS"), (90, "D")]


def test_page_says_what_is_missing_and_why(tmp_path: Path) -> None:
    begun = run_page(read_run(str(write_run(tmp_path / "begun", []))))
    assert missing(begun)["Loss"] == "The run has not logged a step yet."
    plain = {name: value for name, value in metrics_line(1).items() if "by_layer" not in name}
    page = run_page(read_run(str(write_run(tmp_path / "plain", [plain]))))
    assert "has not evaluated" in missing(page)["Held-out perplexity by domain"]
    assert "has not logged the load" in missing(page)["Routing in training"]
    assert "no checkpoint" in missing(page)["Analysis"]
    assert "no events.jsonl" in missing(page)["Events"]
    (tmp_path / "plain" / "config.yaml").write_text("{")
    assert "missing or damaged" in missing(run_page(read_run(str(tmp_path / "plain"))))["Settings"]


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_every_figure_is_valid(kind: str, tmp_path: Path) -> None:
    run = full(tmp_path)
    page = run_page(run) if kind == "run" else comparison_page(distinct_names([run, run]))
    assert figures(page)
    for figure in figures(page).values():
        if "$schema" not in figure.spec:
            vl_convert.vegalite_to_vega(json.dumps(figure.spec))
        assert figure.table.rows, figure.id
        assert {len(row) for row in figure.table.rows} == {len(figure.table.columns)}, figure.id


def test_text_of_users_stays_text(tmp_path: Path) -> None:
    lines = [metrics_line(step, val_perplexity=9.0, val_perplexity_by_domain={EVIL: 8.0}) for step in (1, 2)]
    run = read_run(str(write_run(tmp_path, lines, [{"event": EVIL, "time": 1.0, EVIL: EVIL}])))
    analysis = make_analysis(layers=2, experts=4, name=EVIL, token=EVIL, domains=(EVIL, "code"))
    samples = [Sample(EVIL, EVIL, EVIL)]
    evil = replace(run, name=EVIL, analysis=analysis, samples=samples, settings={EVIL: EVIL}, why_not=EVIL)
    html = render(run_page(evil)).decode()
    tags = Tags(html)
    assert tags.tags.count("script") == 3
    assert "img" not in tags.tags
    assert "b" not in tags.tags
    assert EVIL in json.dumps(json.loads(tags.scripts[0]), ensure_ascii=False).replace('\\"', '"')


def test_only_the_scripts_of_the_page_may_run(tmp_path: Path) -> None:
    html = render(run_page(full(tmp_path))).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 2
    assert "unsafe-eval" not in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]


def test_pages_of_equal_runs_are_equal_in_any_process(tmp_path: Path) -> None:
    restarted(tmp_path)
    code = (
        "import sys, hashlib\n"
        "from moe_ray.analytics.report.build import run_page\n"
        "from moe_ray.analytics.report.page import render\n"
        "from moe_ray.analytics.report.run import read_run\n"
        "print(hashlib.sha256(render(run_page(read_run(sys.argv[1])))).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(digests) == 1


@pytest.mark.parametrize(("layers", "experts", "logged"), [(60, 256, 60), (4, 8, 5000)])
def test_pages_of_large_runs_are_small(layers: int, experts: int, logged: int, tmp_path: Path) -> None:
    line = json.dumps(metrics_line(7, layers, experts)).replace('"step": 7', '"step": @')
    write_run(tmp_path, [metrics_line(1, layers, experts)], steps=logged)
    (tmp_path / "metrics.jsonl").write_text(
        "".join(line.replace("@", str(n)) + "\n" for n in range(1, logged + 1))
    )
    run = replace(read_run(str(tmp_path)), analysis=make_analysis(layers, experts))
    page = run_page(run)
    assert len(render(page)) < MOST_BYTES
    if logged > 1000:
        assert "each point is the mean of about 10" in figures(page)["loss"].text
        assert "120 of 5,000 logged steps" in figures(page)["load-over-time"].text
    else:
        assert "Of 60 layers, the 3 with the least even load" in figures(page)["load-over-time"].text


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_page_is_whole_in_a_browser(width: int, scheme: str, tmp_path: Path) -> None:
    run = full(tmp_path / "run")
    run = replace(run, name=EVIL, analysis=make_analysis(2, 4, token=EVIL, domains=(EVIL, "code")))
    page, path = run_page(run), tmp_path / "report.html"
    path.write_bytes(render(page))

    async def look() -> None:
        async with opened(path, width, scheme=scheme) as tab:
            marks = await tab.evaluate(
                "Object.fromEntries([...document.querySelectorAll('.chart')].map(c => [c.dataset.figure, "
                "c.querySelectorAll('svg [class*=mark-] :is(path, text, line, rect)').length]))"
            )
            assert marks.keys() == figures(page).keys()
            assert [figure for figure, count in marks.items() if count < 3] == []
            overflow = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
            assert await tab.evaluate(overflow) == 0
            assert await tab.evaluate("window.broken") is None
            assert await tab.evaluate(f"Math.min(...{_TICKS})") < 15
            await tab.evaluate(
                "(() => { const form = document.getElementById('range'); form.from.value = 15; "
                "form.from.dispatchEvent(new Event('change', {bubbles: true})) })()"
            )
            look = f"const look = () => Math.min(...{_TICKS}) >= 15 ? done(true) : setTimeout(look, 20); look()"
            assert await tab.evaluate(f"new Promise(done => {{ {look} }})"), "the range of steps moves the charts"
            assert tab.errors == []
            assert tab.requests == []

    asyncio.run(look())


_TICKS = (
    "[...document.querySelector('[data-figure=loss] .role-axis-label').querySelectorAll('text')]"
    ".filter(t => t.getAttribute('opacity') !== '0').map(t => t.textContent)"
)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "no run is given"),
        (["a", "b"], "no folder in common"),
        (["a", "width=3"], "'width' cannot be set"),
        (["a", "out=/"], "names no file"),
        (["a", "tokens=-1"], "tokens='-1' is not allowed"),
        (["/nowhere/run"], "holds no run"),
    ],
)
def test_mistakes_are_told(arguments: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        main(arguments)


def test_queries_of_uris_are_no_options() -> None:
    uri = "s3://runs/a?endpoint_override=127.0.0.1:1&scheme=http"
    assert parse([uri, f"out={uri}"]).runs == (uri,)


def test_runs_are_read_and_pages_written_wherever_storage_is(
    storage_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = open_storage(storage_uri)
    for file in restarted(tmp_path / "made").iterdir():
        storage.write(file.name, file.read_bytes())
    main([storage_uri])
    html = storage.read("report.html").decode()
    assert Tags(html).tags.count("figure") > 8
    output = capsys.readouterr().out
    assert "It restarted once" in output
    assert output.splitlines()[-1].endswith("/report.html")


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [str(restarted(tmp_path / folder / "night")) for folder in ("a", "b")]
    page, place = make_report(runs, str(tmp_path / "out" / "both.html"))
    assert Path(place).stat().st_size < MOST_BYTES
    assert page.title == "night (1), night (2)"
    lines = figures(page)["compare-loss"].spec["layer"][0]["data"]["values"]
    for name in ("compare-tokens-per-second", "compare-load-cv"):
        assert figures(page)[name].spec["layer"][0]["layer"][0]["encoding"]["y"]["scale"] == {"zero": True}
    assert {point["series"] for point in lines} == {"night (1)", "night (2)"}


@pytest.fixture
def trained(tmp_path: Path) -> str:
    """A run of a tiny model on text of two domains."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    settings = tiny_settings(copy_corpus(corpus), tmp_path / "runs", "tiny")
    settings["data"]["sources"] = [f"a={corpus}/[a-c]*.txt", f"b={corpus}/[d-z]*.txt"]
    config = build_config(settings)
    train(config)
    return str(config.train.run_dir)


def test_checkpoints_of_a_run_are_in_its_page(trained: str, one_thread: Callable[[], None]) -> None:
    page, _ = make_report([trained], tokens=512)
    assert {"by-domain", "by-token-class", "flow", "co-activation", "drift", "cost"} <= figures(page).keys()
    samples = [part for section in page.sections for part in section.parts if isinstance(part, Sample)]
    assert [sample.title for sample in samples] == ["a", "b"]
    assert all(sample.prompt and sample.text for sample in samples)
