"""From nothing to a served model on this machine: corpus, cluster, training job, evaluation, endpoint, report.

usage: python jobs/quickstart.py CONFIG [section.field=value ...]

`train.storage` defaults to runs/ of this checkout and `train.name` to a new name. The cluster, in STORAGE/cluster,
and the endpoint stay up afterwards; a second run reuses the cluster and replaces the model. An interrupted run
(Ctrl-C) ends the cluster with all that runs on it.
"""

import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from cluster.head import LOOPBACK, Head, free_port
from cluster.job import await_job, submit, submit_command
from cluster.local import ClusterError, LocalCluster
from jobs.cli import exit_on_error
from moe_ray.config import Config, describe_settings, load_config
from moe_ray.errors import ConfigError, MoeRayError
from moe_ray.models.hf.resolve import resolve_model

ROOT = Path(__file__).resolve().parents[1]
_PROMPT = "And it came to pass in those days, that"
_MAX_TOKENS = 64
# A second or two of analysis.
_REPORT_TOKENS = 4096
_HTTP_PORT = 8000
_DEPLOY_SECONDS = 300
_POLL_SECONDS = 0.5
_APPLICATION = "default"
_APPLICATIONS = "/api/serve/applications/"


class Interrupted(BaseException):
    """A signal asked for the end; not an Exception, so that nothing on the way takes it for an error."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Stages:
    """Prints what is done and how long it took."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._number = 0

    @contextmanager
    def stage(self, title: str) -> Generator[None]:
        """Announce a stage, and say its seconds after it."""
        self._number += 1
        print(f"[{self._number}/{self._total}] {title}", flush=True)
        started = time.perf_counter()
        yield
        say(f"{time.perf_counter() - started:.1f} s")


def say(text: str) -> None:
    """Print lines that belong to the current stage."""
    print("\n".join(f"      {line}" for line in text.splitlines()), flush=True)


def main(arguments: list[str]) -> None:
    """Run all stages; whatever cuts them short also ends what they started."""
    name = time.strftime("quickstart-%Y%m%d-%H%M%S")
    defaults = [f"train.storage={ROOT / 'runs'}", f"train.name={name}"]
    # By key, the last counts; the command that is shown later needs no other.
    overrides = {item.partition("=")[0].strip(): item for item in [*defaults, *arguments[1:]]}
    given = load_config(arguments[0], list(overrides.values())).train.storage
    if "://" in given:
        raise ConfigError(
            f"train.storage={given!r}: the quickstart keeps its cluster with its runs.",
            "give a folder of this disk.",
        )
    storage = Path(given).expanduser().resolve()
    # The job runs in another folder, from which a relative path leads elsewhere.
    overrides["train.storage"] = f"train.storage={storage}"
    config = resolve_model(load_config(arguments[0], list(overrides.values())))
    cluster = LocalCluster(storage / "cluster")
    was_running = cluster.head() is not None
    _catch_signals()
    try:
        _run(cluster, config, [_config_path(arguments[0]), *overrides.values()], name)
    except MoeRayError:
        if not was_running:
            _stop(cluster)
        raise
    except BaseException as reason:
        _stop(cluster)
        if isinstance(reason, Interrupted):
            _exit(128 + reason.number)
        raise


def _run(cluster: LocalCluster, config: Config, arguments: list[str], job_id: str) -> None:
    stages = Stages(7)
    run_dir = config.train.run_dir
    with stages.stage("corpus"):
        data_dir = prepare_corpus(config)
    with stages.stage("Ray cluster on this machine"):
        head = start_cluster(cluster, config)
    with stages.stage(f"training on {config.parallel.max_workers} workers, {config.train.steps} steps"):
        train(cluster, head, config, arguments, job_id)
    with stages.stage("held-out evaluation"):
        evaluate(config, data_dir)
    with stages.stage(f"deployment with Ray Serve, {config.serve.min_replicas} replicas"):
        url = deploy(cluster, head, config)
    with stages.stage("completion, streamed"):
        stream(url, config)
    with stages.stage("report"):
        report = draw(config)
    print(f"""
run        {run_dir}
report     {report}
endpoint   {url}/v1
           curl {url}/v1/completions -H 'Content-Type: application/json' \\
             -d '{{"model": "{config.train.name}", "prompt": "{_PROMPT}", "max_tokens": 32}}'
dashboard  {head.dashboard_url} (it asks for the token in {cluster.token_file})
shell      source {cluster.env_file}
stop       {cluster.stop_command()}""")


def _config_path(given: str) -> str:
    """The job runs in a copy of this checkout; a config that is not part of it needs its whole path."""
    path = Path(given).resolve()
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def prepare_corpus(config: Config) -> Path:
    """Token shards of the corpus; made once."""
    # Only here: a wrong setting should be reported at once, and these imports take a second.
    from jobs.prepare import table
    from moe_ray.data.prepare import prepare
    from moe_ray.data.shards import read_index

    folder = prepare(config, progress=sys.stderr.isatty())
    say(f"{table(read_index(folder))}\n{folder}")
    return folder


def start_cluster(cluster: LocalCluster, config: Config) -> Head:
    """A running cluster on which the run and the replicas fit, those of an earlier run included."""
    parallel, serve = config.parallel, config.serve
    needed = parallel.max_workers * parallel.cpus_per_worker + 2 * serve.min_replicas * serve.cpus_per_replica
    head = cluster.start(max(os.cpu_count() or 1, -int(-needed // 1)))
    # Before anything imports ray, which reads them then.
    os.environ.update(cluster.environment(head))
    say(f"{head.num_cpus} CPUs to be granted, dashboard {head.dashboard_url}")
    return head


def train(cluster: LocalCluster, head: Head, config: Config, arguments: list[str], job_id: str) -> None:
    """Submit the training job as a user would, show its progress, and keep its log with the run."""
    from moe_ray.telemetry.progress import ProgressLine

    command = submit_command(["python", "jobs/train.py", *arguments], job_id)
    say(shlex.join(command))
    line = ProgressLine(config.train.run_dir, config.train.steps, sys.stdout)
    try:
        submit(cluster, command, ROOT)
        await_job(cluster, head, job_id, config.train.run_dir / "job.log", line.update)
        line.update()
    finally:
        line.close()


def evaluate(config: Config, data_dir: Path) -> None:
    """Perplexity on held-out text: of the last checkpoint, of a unigram model, and at the first evaluation."""
    from moe_ray.checkpoint.inference import load_for_inference
    from moe_ray.cpu import keep_freed_memory, set_threads
    from moe_ray.telemetry.run_log import read_metrics
    from moe_ray.training.held_out import evaluate_checkpoint

    keep_freed_memory()
    # The cluster idles on the same cores, and threads that wait for a busy core slow all others down.
    set_threads((os.cpu_count() or 1) / 2)
    result = evaluate_checkpoint(load_for_inference(config.train.run_dir), data_dir)
    say(
        f"perplexity {result['val_perplexity']:.1f} on {result['tokens']:,} tokens, unigram model "
        f"{result['unigram_perplexity']:.1f}"
    )
    course = [m for m in read_metrics(config.train.run_dir) if "val_perplexity" in m]
    say("during training: " + ", ".join(f"{m['val_perplexity']:.1f} at step {m['step']}" for m in course))


def deploy(cluster: LocalCluster, head: Head, config: Config) -> str:
    """Serve the run's newest checkpoint in place of what was served before; returns the endpoint's URL.

    Raises:
        ClusterError: the replicas do not become healthy.
    """
    import ray
    from ray import serve

    from serve_apps.moe_lm import build

    ray.init(log_to_driver=False, logging_level=logging.ERROR)
    # Ray has just put its own in place.
    _catch_signals()
    for name in ("ray", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options = cluster.get(head, _APPLICATIONS).get("http_options") or {}
    port = options.get("port") or free_port(_HTTP_PORT)
    serve.start(http_options={"host": LOOPBACK, "port": port})
    target = serve.RunTarget(build({"checkpoint": str(config.train.run_dir)}), name=_APPLICATION)
    asked = time.time()
    serve.run_many([target], wait_for_applications_running=False)
    _await_replicas(cluster, head, asked)
    ray.shutdown()
    say(f"http://{LOOPBACK}:{port}/v1, model {config.train.name}")
    return f"http://{LOOPBACK}:{port}"


def _await_replicas(cluster: LocalCluster, head: Head, asked: float) -> None:
    """Wait until all replicas that take requests are younger than the deployment that was asked for."""
    status, message = "absent", "it did not come up in time"
    while time.time() < asked + _DEPLOY_SECONDS:
        application = cluster.get(head, _APPLICATIONS)["applications"].get(_APPLICATION, {})
        deployments = application.get("deployments", {}).values()
        replicas = [replica for deployment in deployments for replica in deployment["replicas"]]
        status, message = application.get("status", status), application.get("message") or message
        if status in ("DEPLOY_FAILED", "UNHEALTHY"):
            break
        starts = [replica["start_time_s"] or 0 for replica in replicas if replica["state"] != "STOPPING"]
        # The clocks are the same: the cluster is on this machine.
        if status == "RUNNING" and starts and min(starts) >= asked:
            return
        time.sleep(_POLL_SECONDS)
    raise ClusterError(
        f"the deployment has status {status}: {' '.join(message.split())[:500]}.",
        f"see the Serve page of {head.dashboard_url} and {head.temp_dir}/session_latest/logs/serve.",
    )


def stream(url: str, config: Config) -> None:
    """Print a completion while it is generated."""
    from openai import OpenAI, OpenAIError

    context = config.serve.max_context or config.model.max_sequence_length
    try:
        with OpenAI(base_url=f"{url}/v1", api_key="none").completions.create(
            model=config.train.name,
            prompt=_PROMPT,
            max_tokens=min(_MAX_TOKENS, context // 2),
            temperature=0.7,
            seed=0,
            stream=True,
        ) as chunks:
            print(f"      {_PROMPT}", end="", flush=True)
            for chunk in chunks:
                text = "".join(choice.text for choice in chunk.choices)
                print(text.replace("\n", "\n      "), end="", flush=True)
        print(flush=True)
    except OpenAIError as error:
        raise ClusterError(f"{url} gave no completion: {error}.", f"see {url}/readyz.") from None


def draw(config: Config) -> str:
    """Write the page about the run, and say what its summary says; returns its path."""
    from jobs.report import make_report

    page, place = make_report([str(config.train.run_dir)], tokens=_REPORT_TOKENS)
    say("\n".join(finding.text for finding in page.findings if finding.id in ("load", "by-domain", "time-shares")))
    return place


def _stop(cluster: LocalCluster) -> None:
    """End the cluster, whatever signals still come."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    print("stopping the cluster …", file=sys.stderr, flush=True)
    if "ray" in sys.modules:
        import ray

        ray.shutdown()
    cluster.stop()


def _catch_signals() -> None:
    def interrupt(number: int, _frame: object) -> NoReturn:
        raise Interrupted(number)

    # A shell lets background commands ignore SIGINT; whoever sends it here means it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupt)
    # nohup ignores it on purpose.
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, interrupt)


def _exit(code: int) -> NoReturn:
    """Leave at once: threads of Ray would still wait for a cluster that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv[1:]):
        print(f"{__doc__.strip()}\n\nsettings:\n{describe_settings()}")
        sys.exit(0 if len(sys.argv) > 1 else 2)
    exit_on_error(lambda: main(sys.argv[1:]))
