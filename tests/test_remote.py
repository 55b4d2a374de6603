"""Files at URLs: what is one, what is read and written, and what is said of those that cannot be."""

import fsspec
import pytest
from keepdrop.errors import UserError
from keepdrop.remote import Store, is_url, local, local_if_there, named, writing


@pytest.mark.parametrize("url", ["s3://bucket/run", "s3:/bucket/run", "memory://run", "file:///tmp/run", "gs://b"])
def test_urls(url):
    assert is_url(url)


@pytest.mark.parametrize(
    "path", ["runs/one", "/runs/one", "C:\\runs", "c:/runs", "hf://owner/name", "pretrained", None]
)
def test_what_is_no_url(path):
    assert not is_url(path)


def test_a_path_stays_itself(tmp_path):
    assert local(tmp_path) == tmp_path and local("a/b").parts == ("a", "b")
    with writing(tmp_path) as folder:
        assert folder == tmp_path


def test_a_file_that_may_be_there(memory, tmp_path):
    with writing("memory://there") as folder:
        (folder / "one.txt").write_text("1")
    assert local_if_there("memory://there/one.txt").read_text() == "1"
    assert local_if_there("memory://there/two.txt") is None and local_if_there("memory:/nowhere/one.txt") is None
    assert local_if_there(tmp_path) is None and local_if_there(__file__).samefile(__file__)


@pytest.mark.parametrize("kind", ["memory://there", "file"])
def test_what_is_written_is_read_back(kind, memory, tmp_path):
    url = f"file://{tmp_path}/there" if kind == "file" else kind
    with writing(url) as folder:
        (folder / "deep").mkdir()
        (folder / "deep/one.txt").write_text("1")
        (folder / "two.txt").write_text("2")
        assert Store(url).listing() == {}  # nothing before it is whole
    assert sorted(Store(url).listing()) == ["deep/one.txt", "two.txt"]
    copy = local(url)
    assert (copy / "deep/one.txt").read_text() == "1" and local(f"{url}/two.txt").read_text() == "2"
    assert local(url) == copy
    pair = ["deep/one.txt", "two.txt"]  # asked anew by what is another object each time, as bound methods are
    assert local(url, tuple(pair).__contains__) == local(url, tuple(pair).__contains__)
    assert not (local(url, lambda name: name == "two.txt") / "deep").exists()
    with writing(url) as folder:
        (folder / "two.txt").write_text("three")
    assert (local(url) / "two.txt").read_text() == "three"  # never an old copy


def test_nothing_is_put_of_what_failed(memory):
    with pytest.raises(RuntimeError), writing("memory://half") as folder:
        (folder / "one.txt").write_text("1")
        raise RuntimeError
    assert Store("memory://half").listing() == {}


def test_errors_name_the_url(tmp_path):
    with pytest.raises(UserError) as caught, named(tmp_path, "s3://bucket/run"):
        raise UserError(f"{tmp_path / 'a.json'} is damaged;", python="call.", typed=f"see {tmp_path}.")
    assert str(caught.value) == "s3://bucket/run/a.json is damaged; call."
    assert caught.value.typed == "s3://bucket/run/a.json is damaged; see s3://bucket/run."


def test_what_cannot_be_read(memory, monkeypatch):
    with pytest.raises(UserError, match="nothing at 'memory://nowhere' that keepdrop reads; check the name"):
        local("memory://nowhere")
    with pytest.raises(UserError, match=r"'nosuch://a' cannot be opened .*Protocol not known.*s3://, gs://, file://"):
        local("nosuch://a")

    def missing(*arguments, **options):
        raise ImportError("Install gcsfs to access Google Cloud Storage")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"'gs://a/b' needs a package .*pip install 'keepdrop\[gcs\]'"):
        local("gs://a/b")


def test_what_may_not_be_written(memory, monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(type(memory), "put_file", refuse)
    with (
        pytest.raises(UserError, match=r"'memory://mine' may not be written \(PermissionError: Access Denied\)"),
        writing("memory://mine") as folder,
    ):
        (folder / "a").write_text("1")


def test_s3(s3, tmp_path):
    with writing(f"{s3}/a") as folder:
        (folder / "one.txt").write_text("1")
    assert (local(f"{s3}/a") / "one.txt").read_text() == "1"
    (tmp_path / "x").write_text("x")
    with pytest.raises(UserError, match=r"'s3://nosuchbucket/x' cannot be written: it, or its bucket, is not there"):
        Store("s3://nosuchbucket/x").put(tmp_path / "x", "x")


@pytest.mark.parametrize("url", ["reference://key::https://host/refs.json", "zip://a::memory://b.zip", "reference://a"])
def test_no_url_leads_through_another(url):
    with pytest.raises(UserError, match="expected a single one"):
        Store(url)


@pytest.mark.parametrize("url", ["s3:", "s3:/", "s3://", "file:///"])
def test_a_protocol_alone_is_no_place(url):
    assert is_url(url)
    with pytest.raises(UserError, match=r"names no place; expected one, such as (s3|file)://BUCKET/NAME\."):
        Store(url)


@pytest.mark.parametrize("url", ["memory://a/../b", "file:///a/.."])
def test_no_url_goes_up(url):
    with pytest.raises(UserError, match=r"goes up by '\.\.'; write the URL of the place itself"):
        local(url)
