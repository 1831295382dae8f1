"""A replica follows a run while requests and streams run: none fails, none mixes weights."""

import asyncio
import json
import threading

import httpx
import torch

from moe_ray.checkpoint.attempt import Attempt
from moe_ray.checkpoint.catalog import checkpoint_name, read_manifest
from moe_ray.checkpoint.inference import load_for_inference
from moe_ray.checkpoint.manifest import TOKENIZER
from moe_ray.checkpoint.writer import CheckpointWriter, Origin, Outcome
from moe_ray.config import CheckpointConfig, Config, ModelConfig, TrainConfig
from moe_ray.data.tokenizer import train_tokenizer
from moe_ray.models.transformer import build_model
from moe_ray.parallel.mesh import build_mesh
from moe_ray.serve_config import ServeConfig
from moe_ray.serving.app import make_app
from moe_ray.serving.completions import CompletionService
from moe_ray.serving.follow import Follower
from moe_ray.storage import open_storage

BODY = {"model": "tiny", "prompt": "the cat", "max_tokens": 48, "temperature": 0}


class Run:
    """A run whose checkpoints have weights of their own."""

    def __init__(self, folder):
        tokenizer = train_tokenizer(["the cat sat on the mat and saw the other cat"] * 5, 300)
        tokenizer.save(folder / TOKENIZER)
        self.config = Config(
            model=ModelConfig(
                vocab_size=tokenizer.vocab_size,
                dim=32,
                num_layers=2,
                num_heads=2,
                num_kv_heads=1,
                num_experts=4,
                expert_dim=32,
                max_sequence_length=256,
                init_std=0.4,
            ),
            checkpoint=CheckpointConfig(keep_last=9),
            train=TrainConfig(storage=str(folder), name="tiny"),
            serve=ServeConfig(runner="torch"),
        )
        self.path = folder / "tiny"
        self._files = {TOKENIZER: (folder / TOKENIZER).read_bytes()}
        run = open_storage(self.config.train.run_uri)
        self._attempt = Attempt(run, "attempt", lambda: True)
        self._attempt.claim()
        self._run = run

    def save(self, step):
        model = build_model(self.config.model, seed=step)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        origin = Origin(self.config, self._run, self._attempt, "none", self._files)
        writer = CheckpointWriter(origin, build_mesh(1), model, optimizer)
        writer.begin(step, {})
        assert writer.finish() is Outcome.SAVED

    def load(self, source):
        return CompletionService(load_for_inference(source), self.config.serve)


def ask(client, **fields):
    return client.post("/v1/completions", json=BODY | fields)


async def text_of(client):
    return (await ask(client)).json()["choices"][0]["text"]


async def streamed_text(client):
    answer = await ask(client, stream=True)
    assert answer.status_code == 200
    events = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def open_client(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60)


async def served_step(client):
    return (await client.get("/v1/models")).json()["data"][0]["step"]


def engines():
    return [thread for thread in threading.enumerate() if thread.name == "engine"]


def test_requests_go_on_while_checkpoints_appear(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = len(engines())
    run = Run(tmp_path)
    run.save(1)
    follower = Follower(str(run.path), run.load, make_app, poll_seconds=0.05)
    seen = set()

    async def work(client, ask_once, done):
        while not done.is_set():
            seen.add(await ask_once(client))

    async def main():
        done = asyncio.Event()
        async with open_client(follower) as client:
            workers = [asyncio.create_task(work(client, f, done)) for f in (text_of, streamed_text)]
            for step in (2, 3, 4):
                await asyncio.to_thread(save, step)
                while not await is_taken(client, step):
                    await asyncio.sleep(0)
                    assert not any(worker.done() for worker in workers)
            done.set()
            await asyncio.gather(*workers)
            seen.add(await text_of(client))

    async def is_taken(client, step):
        if step == 3:
            return "refused the checkpoint of step 3" in caplog.text and await served_step(client) == 2
        return await served_step(client) == step

    def save(step):
        if step != 3:
            return run.save(step)
        # Made elsewhere, so that it appears at once and damaged.
        (tmp_path / "other").mkdir()
        other = Run(tmp_path / "other")
        other.save(step)
        folder = other.path / checkpoint_name(step)
        weights = next(folder / e.name for e in read_manifest(folder).files if e.kind == "model")
        weights.write_bytes(weights.read_bytes()[:-1])
        folder.rename(run.path / checkpoint_name(step))

    asyncio.run(main())
    follower.close()
    assert len(engines()) == before

    async def outputs():
        texts = set()
        for step in (1, 2, 3, 4):
            if step == 3:
                continue
            service = run.load(run.path / checkpoint_name(step))
            async with open_client(make_app(service)) as client:
                texts.add(await text_of(client))
            service.close()
        return texts

    expected = asyncio.run(outputs())
    assert len(expected) == 3
    assert seen == expected
