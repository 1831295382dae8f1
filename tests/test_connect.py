"""How a job comes to its Ray cluster: it says what it waits for, and what goes wrong is one line."""

import logging
import socket
from pathlib import Path

import pytest
import ray

from moe_ray.config import ParallelConfig
from moe_ray.errors import ConfigError, TrainingError
from moe_ray.training.launcher import connect


def test_a_cluster_that_does_not_start_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Paths of sockets are limited.
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("long" * 30)))
    with (
        caplog.at_level(logging.INFO, "moe_ray"),
        pytest.raises(TrainingError, match=r"Ray did not start on this machine: .*path length.*Fix: ") as error,
    ):
        connect(ParallelConfig())
    assert "\n" not in str(error.value)
    assert "starting Ray on this machine" in caplog.text
    assert not ray.is_initialized()


def test_a_cluster_that_is_gone_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listening.getsockname()[1]}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=f"no cluster at RAY_ADDRESS='{address}': .*refused.*Fix: "):
        connect(ParallelConfig())


def test_a_wrong_address_is_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    with (
        caplog.at_level(logging.INFO, "moe_ray"),
        pytest.raises(ConfigError, match=r"there is no cluster at RAY_ADDRESS='nowhere': .*Fix: ") as error,
    ):
        connect(ParallelConfig())
    assert "\n" not in str(error.value)
    assert "joining the cluster at nowhere" in caplog.text
