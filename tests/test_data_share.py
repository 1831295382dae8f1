"""Prepared data reaches nodes that have no folder in common with the driver, through an object store."""

import shutil
from pathlib import Path

import pytest

from moe_ray.config import build_config
from moe_ray.data.prepare import prepare
from moe_ray.data.reader import open_data
from moe_ray.data.shards import read_index
from moe_ray.data.share import obtain, share
from moe_ray.errors import DataError
from moe_ray.storage import open_storage
from tests.s3_server import S3Server
from tests.tiny import copy_corpus, tiny_settings
from tests.worlds import run_world


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    corpus = copy_corpus(tmp_path_factory.mktemp("corpus"))
    return prepare(build_config(tiny_settings(corpus, corpus, "run")))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_node_without_the_folder_gets_a_copy(prepared: Path, s3: S3Server, tmp_path: Path) -> None:
    store = open_storage(s3.fresh_uri())
    share(prepared, store)
    before = store.list()
    share(prepared, store)
    assert store.list() == before
    digest = read_index(prepared).digest
    assert obtain(prepared, digest, store) == prepared
    copy = obtain(tmp_path / "elsewhere" / "data", digest, store)
    assert content(copy) == content(prepared)
    assert open_data(copy, 32, verify=True).index.digest == digest


def test_other_data_in_the_folder_is_not_taken_for_it(prepared: Path, s3: S3Server, tmp_path: Path) -> None:
    store = open_storage(s3.fresh_uri())
    share(prepared, store)
    other = tmp_path / "data"
    corpus = copy_corpus(tmp_path)
    (corpus / "ast.txt").unlink()
    tree = tiny_settings(corpus, corpus, "run")
    tree["data"]["path"] = str(other)
    prepare(build_config(tree))
    copy = obtain(other, read_index(prepared).digest, store)
    assert copy != other
    assert content(copy) == content(prepared)


def test_ranks_of_a_node_share_one_copy(prepared: Path, s3: S3Server, tmp_path: Path) -> None:
    uri = s3.fresh_uri()
    share(prepared, open_storage(uri))
    run_world(3, _rank, tmp_path / "data", read_index(prepared).digest, uri)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1


def _rank(rank: int, folder: Path, digest: str, uri: str) -> None:
    assert read_index(obtain(folder, digest, open_storage(uri))).digest == digest


def test_missing_and_damaged_data_is_named(prepared: Path, s3: S3Server, tmp_path: Path) -> None:
    store = open_storage(s3.fresh_uri())
    digest = read_index(prepared).digest
    with pytest.raises(DataError, match="neither on this node nor in"):
        obtain(tmp_path / "data", digest, store)
    damaged = shutil.copytree(prepared, tmp_path / "damaged")
    shard = max(damaged.iterdir(), key=lambda path: path.stat().st_size)
    shard.write_bytes(b"\0" * shard.stat().st_size)
    share(damaged, store)
    with pytest.raises(DataError, match=shard.name):
        obtain(tmp_path / "data", digest, store)
