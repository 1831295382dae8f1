"""Alerts by their states, who is told of them and how often, and the health that follows from them."""

import json
import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from moe_ray.errors import ConfigError
from moe_ray.telemetry.alerts import Alert, Alerts, State
from moe_ray.telemetry.conditions import Condition, Term
from moe_ray.telemetry.health import Status, health
from moe_ray.telemetry.notify import WEBHOOK_VARIABLE, Webhook, log_alert, open_webhook
from moe_ray.telemetry.rules import RULES, Rule
from moe_ray.telemetry.sample_store import SampleStore
from moe_ray.telemetry.samples import Sample
from tests.conftest import free_port
from tests.waiting import until

LOSS = Rule(
    "Loss",
    "training",
    "critical",
    (Condition(Term("moe_train_loss"), ">", 5, ("run",)),),
    "loss {value} of {run}",
    "lower optim.lr",
    for_seconds=20,
    cooldown_seconds=100,
)


class Scene:
    """A store, and what is told of the rule above."""

    def __init__(self, rule: Rule = LOSS) -> None:
        self.store = SampleStore()
        self.alerts = Alerts([rule])

    def at(self, now: float, **losses: float) -> list[tuple[str, State]]:
        self.store.add(now, [Sample("moe_train_loss", {"run": run}, loss) for run, loss in losses.items()], "test")
        return [(dict(alert.labels)["run"], alert.state) for alert in self.alerts.update(self.store, now)]


def test_an_alert_is_pending_then_fires_then_resolves():
    scene = Scene()
    assert scene.at(0, a=9) == []
    assert [alert.state for alert in scene.alerts.active(State.PENDING)] == [State.PENDING]
    assert scene.at(19, a=9) == []
    assert scene.at(20, a=9) == [("a", State.FIRING)]
    assert scene.at(30, a=9) == []
    assert scene.at(40, a=1) == [("a", State.RESOLVED)]
    assert not scene.alerts.active()


def test_a_break_begins_the_time_anew():
    scene = Scene()
    assert [scene.at(now, a=loss) for now, loss in ((0, 9), (15, 1), (16, 9), (30, 9))] == [[], [], [], []]
    assert scene.at(36, a=9) == [("a", State.FIRING)]


def test_each_set_of_labels_has_its_own_alert():
    scene = Scene()
    scene.at(0, a=9, b=1)
    assert scene.at(20, a=9, b=9) == [("a", State.FIRING)]
    assert scene.at(40, a=9, b=9) == [("b", State.FIRING)]
    assert scene.at(50, b=9) == [("a", State.RESOLVED)]


def test_one_notification_in_a_cooldown():
    scene, told = Scene(), []
    for now in range(0, 300, 5):
        # It fires for 25 seconds of every 50.
        told += [(now, state) for _, state in scene.at(now, a=9 if now % 50 < 26 else 1)]
    firing = [now for now, state in told if state is State.FIRING]
    assert firing == [20, 120, 220]
    assert len([1 for _, state in told if state is State.RESOLVED]) == 3


def test_one_that_lasts_beyond_the_cooldown_of_an_earlier_is_told():
    scene = Scene()
    for now in (0, 20):
        scene.at(now, a=9)
    scene.at(25, a=1)
    assert [scene.at(now, a=9) for now in (30, 50, 119)] == [[], [], []]
    assert scene.at(120, a=9) == [("a", State.FIRING)]
    assert scene.at(125, a=1) == [("a", State.RESOLVED)]


def test_health_names_reasons_and_actions():
    scene = Scene()
    for now in (0, 20):
        scene.at(now, a=9)
    found = health(scene.alerts.active(), ["training", "host"])
    assert (found.status, found.of("training"), found.of("host")) == (
        Status.UNHEALTHY,
        Status.UNHEALTHY,
        Status.HEALTHY,
    )
    (alert,) = found.record()["components"]["training"]["alerts"]
    assert (alert["summary"], alert["action"]) == ("loss 9 of a", "lower optim.lr")
    assert {sample.labels["component"]: sample.value for sample in found.samples()} == {"training": 0, "host": 1}
    assert health([], ["host"]).status is Status.HEALTHY


def test_a_warning_degrades():
    warning = next(rule for rule in RULES if rule.severity == "warning")
    alert = Alert(warning, (("run", "a"),), State.FIRING, 0.0, 1.0)
    assert health([alert], [warning.component]).status is Status.DEGRADED


def test_a_ratio_over_nothing_is_json():
    record = Alert(LOSS, (("run", "a"),), State.FIRING, 5.0, math.inf).record()
    assert (record["value"], record["summary"]) == (None, "loss +Inf of a")
    json.dumps(record, allow_nan=False)


@contextmanager
def server(statuses: list[int]) -> Iterator[tuple[str, list[dict]]]:
    """A real server that answers with each of the statuses in turn, the last for ever; and the bodies it got."""
    bodies: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_address[1]}/secret", bodies
    finally:
        httpd.shutdown()
        httpd.server_close()


FIRING = Alert(LOSS, (("run", "a"),), State.FIRING, 5.0, 9.0)


def test_a_webhook_gets_json_and_a_busy_server_is_asked_again():
    with server([503, 200]) as (url, bodies):
        webhook = Webhook(url)
        webhook(FIRING)
        until(lambda: len(bodies) == 2)
        webhook.close()
    assert bodies[0] == bodies[1]
    assert bodies[0] == FIRING.record() | {"text": "[firing] Loss: loss 9 of a"}


def test_what_has_resolved_is_named_and_no_longer_claimed():
    full = next(rule for rule in RULES if rule.name == "DiskFull")
    resolved = Alert(full, (("path", "/data"),), State.RESOLVED, 5.0, 0.0)
    with server([200]) as (url, bodies):
        webhook = Webhook(url)
        webhook(resolved)
        webhook.close()
    assert (bodies[0]["text"], bodies[0]["summary"]) == ("resolved DiskFull (path=/data)",) * 2
    assert Alert(LOSS, (), State.RESOLVED, 5.0, 0.0).summary == "resolved Loss"


def test_a_resolution_is_logged_with_what_resolved(our_log):
    with our_log.at_level(logging.INFO, logger="moe_ray"):
        log_alert(Alert(LOSS, (("run", "a"),), State.RESOLVED, 5.0, 9.0))
    assert our_log.messages == ["resolved Loss (run=a)"]


@pytest.mark.parametrize("statuses", [[302], [403]])
def test_a_refusal_is_not_repeated_and_no_redirect_followed(statuses, our_log):
    with server(statuses) as (url, bodies):
        webhook = Webhook(url)
        webhook(FIRING)
        until(lambda: our_log.messages)
        webhook.close()
    assert len(bodies) == 1
    assert f"status {statuses[0]}" in our_log.text


def test_a_webhook_that_nobody_answers_blocks_nobody_and_its_secret_is_not_told(our_log):
    webhook = Webhook(f"http://127.0.0.1:{free_port()}/secret")
    for _ in range(1000):
        webhook(FIRING)
    webhook.close(seconds=0)
    assert "too many alerts wait" in our_log.text
    assert "secret" not in our_log.text


@pytest.fixture
def our_log(caplog, monkeypatch):
    """Log lines of the package, wherever another test has led them."""
    monkeypatch.setattr(logging.getLogger("moe_ray"), "propagate", True)
    return caplog


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/secret",
        "ftp://127.0.0.1/secret",
        "https://user:secret@example.com/",
        "secret",
        "https://[",
    ],
)
def test_urls_that_are_not_safe_are_refused_without_telling_them(url):
    with pytest.raises(ConfigError) as error:
        Webhook(url)
    assert "secret" not in str(error.value)


def test_where_the_url_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv(WEBHOOK_VARIABLE, raising=False)
    assert open_webhook(None) is None
    with pytest.raises(ConfigError, match=r"telemetry\.webhook_file"):
        open_webhook(str(tmp_path / "missing"))
    file = tmp_path / "url"
    with server([200]) as (url, bodies):
        file.write_text(f"{url}\n")
        for given in (str(file), None):
            monkeypatch.setenv(WEBHOOK_VARIABLE, url)
            webhook = open_webhook(given)
            assert webhook is not None
            webhook(FIRING)
            webhook.close()
    assert len(bodies) == 2
