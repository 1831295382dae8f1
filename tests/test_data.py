"""Tokenizer, shards, preparation and batches, through their public interface and with real files."""

import fcntl
import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_ray.config import Config, build_config, to_yaml
from moe_ray.data import publish as publishing
from moe_ray.data.batches import micro_batches, train_batch, unigram_perplexity, validation_batches
from moe_ray.data.prepare import prepare, prepared_dir
from moe_ray.data.reader import TokenData, open_data
from moe_ray.data.shards import SPLITS, ShardWriter, read_index
from moe_ray.data.tokenizer import load_tokenizer, train_tokenizer
from moe_ray.errors import ConfigError, DataError, StorageError

ROOT = Path(__file__).parent.parent
WORDS = [f"w{n:x}{'aeiou'[n % 5]}" for n in range(400)]


def words(seed: int, count: int) -> str:
    generator = random.Random(seed)
    lines = (" ".join(generator.choices(WORDS, k=8)) for _ in range(count // 8))
    return "\n".join(lines) + "\n"


def write_rows(path: Path, num_rows: int, seed: int = 0) -> Path:
    rows = [json.dumps({"text": words(seed * 10_000 + n, 80)}) for n in range(num_rows)]
    path.write_text("\n".join(rows) + "\n")
    return path


def make_config(tmp_path: Path, *sources: object, vocab_size: int = 300, **data: object) -> Config:
    return build_config(
        {
            "model": {"vocab_size": vocab_size},
            "data": {
                "sources": [str(s) for s in sources],
                "sequence_length": 16,
                "validation_fraction": 0.1,
                **data,
            },
            "train": {"storage": str(tmp_path / "storage")},
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> TokenData:
    """Two domains of 60 and 20 documents."""
    folder = tmp_path_factory.mktemp("data")
    sources = (write_rows(folder / "big.jsonl", 60), write_rows(folder / "small.jsonl", 20, seed=1))
    return open_data(prepare(make_config(folder, *sources)), 16, verify=True)


def file_hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def inodes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.parent.iterdir() if ".new-" in path.name or ".old-" in path.name]


# Tokenizer


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    ranges = [(0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000), (9, 33)]

    def character() -> str:
        return chr(generator.randrange(*generator.choice(ranges)))

    return ["".join(character() for _ in range(generator.randrange(60))) for _ in range(count)]


def test_any_unicode_text_survives_the_round_trip():
    tokenizer = train_tokenizer([words(0, 2000)], 400)
    fixed = [
        "",
        " ",
        "\r\n\t  \n\n x",
        "a<|endoftext|>b",
        "e\u0301\u200d🏳️‍🌈",
        "    if x:\n        y = 1234\n",
        "\0",
    ]
    texts = fixed + random_texts(300)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == ids
        assert tokenizer.eos_id not in ids
        assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_tokenizer_basics(tmp_path):
    tokenizer = train_tokenizer([words(0, 4000)], 350)
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.token_id("<|endoftext|>")) == (0, 350, 0)
    assert tokenizer.decode([0, *tokenizer.encode("hi"), 0]) == "hi"
    assert len(tokenizer.encode("12345")) == 5
    tokenizer.save(tmp_path / "t.json")
    loaded = load_tokenizer(tmp_path / "t.json")
    assert loaded.encode(words(7, 100)) == tokenizer.encode(words(7, 100))
    assert loaded.digest == tokenizer.digest == train_tokenizer([words(0, 4000)], 350).digest


def test_indentation_is_one_token():
    tokenizer = train_tokenizer(["def f():\n        return 1\n" * 50], 400)
    assert len(tokenizer.encode("        return")) < len(tokenizer.encode("return")) + 3


def test_few_texts_give_fewer_ids():
    assert 257 <= train_tokenizer(["aab aab"], 4096).vocab_size < 270


def test_tokenizer_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"model.vocab_size=256 has no room.*at least 257"):
        train_tokenizer(["a"], 256)
    with pytest.raises(DataError, match=r"half a surrogate"):
        train_tokenizer(["a"], 257).encode("\ud800")
    with pytest.raises(DataError, match=r"missing.json' cannot be read"):
        load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "bad.json").write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match=r"bad.json': it is no tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json")
    train_tokenizer(["a"], 257).save(tmp_path / "t.json")
    nameless = (tmp_path / "t.json").read_text().replace("<|endoftext|>", "<end>")
    (tmp_path / "nameless.json").write_text(nameless)
    with pytest.raises(DataError, match=r"nameless.json': it has no end-of-text token.*</s>"):
        load_tokenizer(tmp_path / "nameless.json")


def test_a_fork_after_encoding_neither_warns_nor_hangs():
    script = (
        "import os\nfrom moe_ray.data.tokenizer import train_tokenizer\n"
        "t = train_tokenizer(['ab ' * 100] * 50, 300)\nt.encode_batch(['ab'] * 500)\n"
        "pid = os.fork()\nt.encode_batch(['ab'] * 500)\nif pid: os.waitpid(pid, 0)\nelse: os._exit(0)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_the_tokenizer_needs_no_torch():
    script = "import sys, moe_ray.data.tokenizer, moe_ray.data.prepare; print({'torch', 'ray'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"


# Shards


def test_documents_round_trip_through_shards(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [words(n, 80) for n in range(30)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    folder = prepare(make_config(tmp_path, path))
    data, tokenizer = open_data(folder, 16), load_tokenizer(folder / "tokenizer.json")
    decoded = {split: [] for split in SPLITS}
    for split in SPLITS:
        for tokens in data.documents(split, "rows"):
            assert tokens[-1] == tokenizer.eos_id
            decoded[split].append(tokenizer.decode(tokens[:-1].tolist()))
    assert len(decoded["validation"]) == 3
    assert sorted(decoded["train"] + decoded["validation"]) == sorted(texts)
    assert decoded["train"] == [text for text in texts if text in decoded["train"]]
    totals = data.index.totals("validation")
    assert totals.text_bytes == sum(len(text) for text in decoded["validation"])
    assert totals.num_tokens == data.token_counts("validation").sum()


def test_shards_roll_over(tmp_path):
    writer = ShardWriter(tmp_path, "train", "d", "<u4", 9, shard_tokens=5)
    for document in ([70_000, 2], [3, 4, 5], [6], []):
        writer.append(document, 10)
    first, second = writer.finish()
    assert (first.num_tokens, first.num_documents, second.num_tokens, second.num_documents) == (7, 2, 3, 2)
    assert np.fromfile(tmp_path / first.file, "<u4").tolist() == [70_000, 2, 9, 3, 4, 5, 9]
    assert np.load(tmp_path / second.offsets_file).tolist() == [0, 2, 3]


def test_windows_cover_each_domain_once_and_never_cross(data):
    for split in SPLITS:
        number = 0
        for domain_id, domain in enumerate(data.domains):
            stream = np.concatenate(list(data.documents(split, domain)))
            for start in range(0, len(stream) - 16, 16):
                assert np.array_equal(data.sequence(split, number), stream[start : start + 17])
                assert data.domain_ids(split, np.array([number])) == [domain_id]
                number += 1
        assert number == data.num_sequences(split) > 20
    with pytest.raises(IndexError):
        data.sequence("train", data.num_sequences("train"))
    with pytest.raises(ValueError, match="read-only"):
        data.sequence("train", 0)[0] = 1


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    vocabulary = {f"<{n}>": n + 257 for n in range(70_000)}
    train_tokenizer([words(0, 800)], 257).save(tmp_path / "t.json")
    tree = json.loads((tmp_path / "t.json").read_text())
    tree["model"]["vocab"] |= vocabulary
    (tmp_path / "t.json").write_text(json.dumps(tree))
    source = write_rows(tmp_path / "a.jsonl", 20)
    config = make_config(tmp_path, source, tokenizer=str(tmp_path / "t.json"), vocab_size=80_000)
    data = open_data(prepare(config), 16)
    assert (data.index.dtype, data.index.vocab_size) == ("<u4", 70_257)
    assert data.sequence("train", 0).dtype == np.uint32


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "index.json").unlink(), r"is no prepared data: index.json cannot be read"),
        (lambda f: (f / "index.json").write_text("{"), r"index.json is damaged"),
        (lambda f: (f / "index.json").write_text('{"format": 99}'), r"has format 99; this version reads 1"),
        (lambda f: (f / "tokenizer.json").unlink(), r"tokenizer.json cannot be read"),
        (lambda f: os.truncate(f / "train-a-00000.bin", 100), r"train-a-00000.bin has 100 bytes, not \d+"),
        (lambda f: os.truncate(f / "train-a-00000.npy", 100), r"train-a-00000.npy has 100 bytes, not \d+"),
        (lambda f: (f / "validation-a-00000.bin").unlink(), r"validation-a-00000.bin cannot be read"),
    ],
)
def test_damaged_data_is_named_and_prepared_again(tmp_path, damage, message):
    config = make_config(tmp_path, write_rows(tmp_path / "a.jsonl", 20), path=str(tmp_path / "prepared"))
    folder = prepare(config)
    before = file_hashes(folder)
    damage(folder)
    with pytest.raises(DataError, match=message):
        open_data(folder, 16)
    assert prepare(config) == folder
    assert file_hashes(folder) == before
    assert leftovers(folder) == []


def test_verify_finds_a_flipped_bit(tmp_path):
    folder = prepare(make_config(tmp_path, write_rows(tmp_path / "a.jsonl", 20)))
    path = folder / "train-a-00000.bin"
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    open_data(folder, 16)
    with pytest.raises(DataError, match=r"train-a-00000.bin does not have the checksum of its index"):
        open_data(folder, 16, verify=True)


# Preparation


def test_preparing_again_reuses_the_folder(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    config = make_config(tmp_path, write_rows(tmp_path / "a.jsonl", 30))
    folder = prepare(config)
    assert folder == prepared_dir(config)
    assert folder.parent == tmp_path / "storage" / "data"
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    started = time.perf_counter()
    assert prepare(config) == folder
    assert time.perf_counter() - started < 0.5
    assert stamps == {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert f"reused the prepared data in {folder}" in caplog.text


def test_two_preparations_are_byte_identical(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", 40)
    (tmp_path / "y").mkdir()
    folders = [prepare(make_config(tmp_path, source, path=str(tmp_path / name))) for name in "xy"]
    assert folders[0] != folders[1]
    assert file_hashes(folders[0]) == file_hashes(folders[1])


def test_a_change_of_the_inputs_changes_the_folder(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", 30)
    first = make_config(tmp_path, source)
    folder = prepared_dir(first)
    assert prepared_dir(make_config(tmp_path, source, validation_fraction=0.2)) != folder
    assert prepared_dir(make_config(tmp_path, source, vocab_size=301)) != folder
    assert prepared_dir(make_config(tmp_path, f"other={source}")) != folder
    os.utime(source, ns=(1, 1))
    assert prepared_dir(first) != folder


def test_the_split_does_not_depend_on_other_domains_or_the_place(tmp_path):
    (tmp_path / "moved").mkdir()
    held_out = []
    for place in (tmp_path, tmp_path / "moved"):
        sources = [write_rows(place / "a.jsonl", 50)]
        sources += [write_rows(place / "b.jsonl", 30, seed=5)] if place != tmp_path else []
        data = open_data(prepare(make_config(place, *sources, vocab_size=257)), 16)
        held_out.append([tokens.tolist() for tokens in data.documents("validation", "a")])
    assert held_out[0] == held_out[1]
    assert len(held_out[0]) == 5


def test_a_single_document_is_split_on_a_line(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    text = words(0, 4000)
    (tmp_path / "one.txt").write_text(text)
    folder = prepare(make_config(tmp_path, tmp_path / "one.txt"))
    data, tokenizer = open_data(folder, 16), load_tokenizer(folder / "tokenizer.json")
    head, tail = (tokenizer.decode(next(data.documents(split, "one")).tolist()) for split in SPLITS)
    assert head + tail == text
    assert head.endswith("\n")
    assert 0.08 < len(tail) / len(text) < 0.12
    assert (
        "domain 'one' of 1 documents has none to spare: the last 10% of each text is for validation" in caplog.text
    )


def test_a_text_without_lines_is_split_too(tmp_path):
    (tmp_path / "one.txt").write_text(words(0, 4000).replace("\n", " "))
    data = open_data(prepare(make_config(tmp_path, tmp_path / "one.txt")), 16)
    assert data.index.totals("train").text_bytes == round(0.9 * (tmp_path / "one.txt").stat().st_size)


def test_too_little_text_is_an_error_with_numbers(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", 2)
    with pytest.raises(
        DataError, match=r"the validation split has \d+ tokens.*one sequence needs 201.*raise data.valid"
    ):
        prepare(make_config(tmp_path, source, sequence_length=200))
    with pytest.raises(DataError, match=r"the train split has \d+ tokens.*one sequence needs 513"):
        prepare(make_config(tmp_path, write_rows(tmp_path / "b.jsonl", 1), sequence_length=512))
    assert [path.name for path in (tmp_path / "storage/data").iterdir() if "lock" not in path.name] == []


def test_a_given_tokenizer_is_used_as_it_is(tmp_path):
    train_tokenizer([words(3, 4000)], 350).save(tmp_path / "t.json")
    source = write_rows(tmp_path / "a.jsonl", 20)
    folder = prepare(make_config(tmp_path, source, tokenizer=str(tmp_path / "t.json"), vocab_size=400))
    assert (folder / "tokenizer.json").read_bytes() == (tmp_path / "t.json").read_bytes()
    assert read_index(folder).vocab_size == 350
    with pytest.raises(ConfigError, match=r"has 350 ids, model.vocab_size=300 rows.*at least 350"):
        prepare(make_config(tmp_path, source, tokenizer=str(tmp_path / "t.json")))


def test_too_small_a_vocabulary_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match=r"model.vocab_size=256"):
        prepare(make_config(tmp_path, write_rows(tmp_path / "a.jsonl", 2), vocab_size=256))


def test_a_failed_preparation_leaves_the_earlier_folder(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", 30)
    config = make_config(tmp_path, source, path=str(tmp_path / "prepared"))
    folder = prepare(config)
    before = file_hashes(folder)
    with source.open("a") as file:
        file.write("{oops}\n")
    with pytest.raises(DataError, match=r"a.jsonl line 31 is not JSON"):
        prepare(config)
    assert file_hashes(folder) == before
    assert leftovers(folder) == []


def test_sources_that_change_while_they_are_read_are_an_error(tmp_path, monkeypatch):
    source = write_rows(tmp_path / "a.jsonl", 20)
    config = make_config(tmp_path, source, path=str(tmp_path / "prepared"))

    def read_then_change(path: Path, sequence_length: int) -> TokenData:
        os.utime(source, ns=(1, 1))
        return open_data(path, sequence_length)

    monkeypatch.setattr("moe_ray.data.prepare.open_data", read_then_change)
    with pytest.raises(DataError, match=r"data.sources changed while they were read.*run it again"):
        prepare(config)
    assert not (tmp_path / "prepared").exists()


def test_changed_sources_replace_the_folder_at_data_path(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", 30)
    config = make_config(tmp_path, source, path=str(tmp_path / "prepared"))
    opened = open_data(prepare(config), 16)
    before = opened.sequence("train", 3).copy()
    write_rows(source, 40, seed=3)
    assert prepare(config) == tmp_path / "prepared"
    assert read_index(tmp_path / "prepared").totals("train").num_documents == 36
    assert np.array_equal(opened.sequence("train", 3), before), "who reads the old data keeps it"
    assert leftovers(tmp_path / "prepared") == []


def test_a_folder_with_other_files_is_never_replaced(tmp_path):
    precious = tmp_path / "home" / "thesis.txt"
    precious.parent.mkdir()
    precious.write_text("x")
    (tmp_path / "home" / "index.json").write_text("{}")
    config = make_config(tmp_path, write_rows(tmp_path / "a.jsonl", 20), path=str(precious.parent))
    with pytest.raises(DataError, match=r"home is not only prepared data \(there is .*thesis.txt\).*data.path"):
        prepare(config)
    assert precious.read_text() == "x"
    with pytest.raises(DataError, match=r"thesis.txt is not only prepared data"):
        prepare(make_config(tmp_path, tmp_path / "a.jsonl", path=str(precious)))


def test_sources_that_are_gone(tmp_path):
    source = write_rows(tmp_path / "a.jsonl", 20)
    config = make_config(tmp_path, source, path=str(tmp_path / "prepared"))
    folder = prepare(config)
    source.unlink()
    with pytest.raises(DataError, match=r"a.jsonl' does not exist.*cannot be checked.*set data.sources=\[\]"):
        prepare(config)
    assert prepared_dir(config) == folder
    # model_copy checks nothing, so this works whether or not the config allows it.
    as_is = config.model_copy(update={"data": config.data.model_copy(update={"sources": ()})})
    assert prepare(as_is) == folder
    small = as_is.model_copy(update={"model": config.model.model_copy(update={"vocab_size": 260})})
    with pytest.raises(ConfigError, match=r"has 300 ids, model.vocab_size=260"):
        prepare(small)


def start_job(config: Config, path: Path) -> subprocess.Popen:
    path.write_text(to_yaml(config))
    command = [sys.executable, "jobs/prepare.py", str(path)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_preparation_leaves_nothing_that_matters(tmp_path):
    other = make_config(tmp_path, write_rows(tmp_path / "b.jsonl", 20))
    config = make_config(tmp_path, write_rows(tmp_path / "a.jsonl", 1500))
    folder = prepared_dir(config)
    job = start_job(config, tmp_path / "c.yaml")
    try:
        deadline = time.monotonic() + 60
        while not (list(folder.parent.glob(".*.new-*/*.bin")) if folder.parent.exists() else []):
            assert job.poll() is None, job.stderr
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        job.send_signal(signal.SIGKILL)
        job.communicate()
    assert job.returncode == -signal.SIGKILL
    assert not folder.exists()
    assert len(leftovers(folder)) == 1
    prepare(other)
    assert leftovers(folder) == [], "another preparation cleans up too"
    open_data(prepare(config), 16, verify=True)


def test_two_preparations_at_once_share_the_work(tmp_path):
    config = make_config(tmp_path, write_rows(tmp_path / "a.jsonl", 600))
    jobs = [start_job(config, tmp_path / f"{n}.yaml") for n in range(2)]
    outputs = [job.communicate(timeout=100) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert outputs[0][0].splitlines()[-1] == str(prepared_dir(config))
    assert sum("trained a tokenizer" in errors for _, errors in outputs) == 1
    open_data(prepared_dir(config), 16, verify=True)


def test_without_locks_the_loser_uses_what_the_winner_made(tmp_path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    config = make_config(tmp_path, write_rows(tmp_path / "a.jsonl", 20))
    take_place = publishing._take_place
    winners = []

    def lose_the_race(aside: Path, folder: Path) -> bool:
        if not winners:
            winners.append(None)
            prepare(config)
            winners[0] = inodes(folder)
        return take_place(aside, folder)

    monkeypatch.setattr(publishing, "_take_place", lose_the_race)
    folder = prepare(config)
    assert winners == [inodes(folder)]
    assert leftovers(folder) == []


def test_a_folder_renamed_away_by_a_dead_process_comes_back(tmp_path):
    config = make_config(tmp_path, write_rows(tmp_path / "a.jsonl", 20), path=str(tmp_path / "prepared"))
    folder = prepare(config)
    before = inodes(folder)
    folder.rename(tmp_path / ".prepared.old-0123456789ab")
    prepare(config)
    assert inodes(folder) == before


def test_a_full_disk_names_the_folder_and_the_space(tmp_path):
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        config = make_config(tmp_path, write_rows(tmp_path / "a.jsonl", 300), path=str(mount / "prepared"))
        with pytest.raises(StorageError, match=rf"no space left for {mount}/prepared: \d+ bytes are free"):
            prepare(config)
        assert [path.name for path in mount.iterdir()] == [".prepared.lock"]
    finally:
        subprocess.run(["umount", mount], check=True)


def test_storage_that_is_no_folder_is_a_storage_error(tmp_path):
    config = make_config(tmp_path, write_rows(tmp_path / "a.jsonl", 20))
    (tmp_path / "storage").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write .*storage"):
        prepare(config)


def test_the_job_prints_a_table_and_one_line_for_an_error(tmp_path):
    config = make_config(tmp_path, write_rows(tmp_path / "a.jsonl", 30))
    output, errors = start_job(config, tmp_path / "c.yaml").communicate(timeout=60)
    header, columns, row, total, folder = output.splitlines()
    assert header.split() == ["domain", "train", "validation"]
    assert columns.split() == ["documents", "tokens", "B/token"] * 2
    assert row.split()[:2] == ["a", "27"]
    assert row.split()[4] == "3"
    assert total.split()[0] == "all"
    assert Path(folder) == prepared_dir(config)
    assert "encoding" in errors
    (tmp_path / "a.jsonl").unlink()
    job = start_job(config, tmp_path / "c.yaml")
    output, errors = job.communicate(timeout=60)
    assert (job.returncode, output) == (2, "")
    assert errors.startswith("error: data.sources entry")
    assert len(errors.splitlines()) == 1


# Batches


def test_every_epoch_is_another_permutation_of_all_sequences():
    for size in (1, 2, 3, 7, 64, 1000):
        run = np.concatenate([train_batch(size, step, 5, seed=3) for step in range(size)])
        assert run.dtype == np.int64
        epochs = run[: 5 * size].reshape(5, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()
        if size >= 64:
            assert len({tuple(epoch) for epoch in epochs.tolist()}) == 5
            assert not np.array_equal(epochs[0], np.arange(size))
            assert not np.array_equal(epochs[0], np.concatenate([train_batch(size, s, 1, 4) for s in range(size)]))
            assert abs(np.corrcoef(epochs[0], np.arange(size))[0, 1]) < 0.4


def test_the_order_never_changes():
    """A changed order would repeat and skip data in every run that resumes."""
    assert train_batch(1000, 0, 6, seed=0).tolist() == [94, 117, 72, 19, 761, 142]
    assert train_batch(1000, 10**6, 3, seed=12345).tolist() == [27, 89, 117]


def test_the_order_does_not_depend_on_the_batch_or_on_a_resume():
    whole = np.concatenate([train_batch(100, step, 6, seed=1) for step in range(40)])
    assert np.array_equal(whole, np.concatenate([train_batch(100, step, 8, seed=1) for step in range(30)]))
    resumed = [train_batch(100, step, 6, seed=1) for step in range(23, 40)]
    assert np.array_equal(whole[23 * 6 :], np.concatenate(resumed))


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("global_batch", [1, 4, 10])
def test_ranks_share_a_batch_in_order_with_equal_counts(data, world, global_batch):
    numbers = train_batch(data.num_sequences("train"), 3, global_batch, seed=0)
    ranks = [list(micro_batches(data, "train", numbers, rank, world, micro_batch=2)) for rank in range(world)]
    largest = -(-global_batch // world)
    assert {len(pieces) for pieces in ranks} == {-(-largest // 2)}
    sizes = [sum(len(piece.tokens_BS) for piece in pieces) for pieces in ranks]
    assert sum(sizes) == global_batch
    assert max(sizes) - min(sizes) <= 1
    expected = torch.from_numpy(np.stack([data.sequence("train", n) for n in numbers]).astype(np.int64))
    pieces = [piece for rank in ranks for piece in rank]
    assert torch.equal(torch.cat([piece.tokens_BS for piece in pieces]), expected[:, :-1])
    assert torch.equal(torch.cat([piece.targets_BS for piece in pieces]), expected[:, 1:])
    assert torch.cat([piece.domains_B for piece in pieces]).tolist() == data.domain_ids("train", numbers).tolist()
    for piece in pieces:
        assert len(piece.tokens_BS) <= 2
        assert piece.tokens_BS.shape == piece.targets_BS.shape == (len(piece.domains_B), 16)
        assert piece.tokens_BS.dtype == piece.targets_BS.dtype == piece.domains_B.dtype == torch.int64


def test_validation_covers_the_domains_in_proportion(data):
    total = data.num_sequences("validation")
    batches = validation_batches(total, 4, 5)
    assert [len(batch) for batch in batches] == [4] * 5
    numbers = np.concatenate(batches)
    assert len(set(numbers.tolist())) == 20
    share = data.num_sequences("validation", "small") / total
    assert (data.domain_ids("validation", numbers) == 1).mean() == pytest.approx(share, abs=0.06)
    assert [len(batch) for batch in validation_batches(10, 4, 99)] == [4, 4, 2]
    assert np.concatenate(validation_batches(10, 4, 99)).tolist() == list(range(10))


def test_unigram_perplexity(data, tmp_path):
    train, validation = (np.concatenate([t for d in data.domains for t in data.documents(s, d)]) for s in SPLITS)
    probability = [
        (np.sum(train == token) + 1) / (len(train) + data.index.vocab_size) for token in validation[:50]
    ]
    assert 20 < unigram_perplexity(data) < data.index.vocab_size
    counts = data.token_counts("train")
    assert [(counts[t] + 1) / (counts.sum() + 300) for t in validation[:50]] == pytest.approx(probability)
    expected = np.exp(-np.mean([np.log((counts[t] + 1) / (counts.sum() + 300)) for t in validation]))
    assert unigram_perplexity(data) == pytest.approx(expected)


def test_the_digest_names_the_tokens(data, tmp_path):
    source = write_rows(tmp_path / "big.jsonl", 60)
    one = prepare(make_config(tmp_path, source))
    os.utime(source, ns=(1, 1))
    two = prepare(make_config(tmp_path, source))
    assert one != two
    assert read_index(one).digest == read_index(two).digest != data.index.digest
