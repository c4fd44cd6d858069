"""What is called pushed is in the remote, and what is called pulled is here; S3 by moto's server."""

import itertools
import shutil

import pytest

from kshot.data.datasets import ImageSet
from kshot_flows.data import extras, versioning
from kshot_flows.data.versioning import Recorded
from kshot_runtime.errors import KshotError

_buckets = itertools.count()


@pytest.fixture
def local(project, tmp_path):
    """The project with a folder as its remote, and two data sets of which `zoo` is recorded."""
    store = tmp_path / "store"
    with (project / ".dvc" / "config").open("a") as config:
        config.write(f"    remote = store\n['remote \"store\"']\n    url = {store}\n")
    return store


@pytest.fixture
def s3(project, s3_server, monkeypatch):
    """A client of S3, and the name of an empty bucket that is the project's remote."""
    import boto3

    for name, value in (("ACCESS_KEY_ID", "key"), ("SECRET_ACCESS_KEY", "secret"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = f"bucket-{next(_buckets)}"
    client = boto3.client("s3", endpoint_url=s3_server)
    client.create_bucket(Bucket=bucket)
    with (project / ".dvc" / "config").open("a") as config:
        config.write(
            f"    remote = s3\n['remote \"s3\"']\n    url = s3://{bucket}/data\n    endpointurl = {s3_server}\n"
        )
    yield client, bucket
    client.close()


def test_a_clone_pulls_what_was_pushed_whole_or_by_name(project, tmp_path, local, git, commit, take):
    root = project / "data"
    take(root)
    take(root, "pets", seed=1)
    versioning.record(root)
    commit(project)
    assert versioning.push(root, "zoo") == 3  # two files and their list
    assert versioning.push(root) == 3
    assert versioning.push(root) == 0
    git(tmp_path, "clone", "-q", "project", "clone")
    there = tmp_path / "clone" / "data"
    present = versioning.ensure("zoo", there)
    assert (present.how, present.same) == ("pulled", True)
    present.data_set.verify()
    assert versioning.state_of(there) == {"pets": "missing", "zoo": "recorded"}
    assert versioning.record(there) == Recorded()
    assert versioning.pull(there) == ["pets"]
    assert versioning.pull(there) == []
    assert git(tmp_path / "clone", "status", "--short") == ""

    take(there, "mine", seed=3)
    take(there, "zoo", seed=4, replace=True)
    mine, zoo = (ImageSet.open(there / name).version for name in ("mine", "zoo"))
    shutil.rmtree(there / "pets")
    assert versioning.pull(there, "pets") == ["pets"]  # touches no other
    with pytest.raises(
        KshotError, match=r"remove data that no version records \(zoo: changed\).* kshot data commit zoo"
    ):
        versioning.pull(there)
    assert ImageSet.open(there / "mine").version == mine
    assert ImageSet.open(there / "zoo").version == zoo


def test_what_was_built_and_never_recorded_here_is_pushed_all_the_same(project, tmp_path, local, git, commit, take):
    take(project / "data")
    versioning.record(project / "data")
    commit(project)
    git(tmp_path, "clone", "-q", "project", "clone")
    there = tmp_path / "clone" / "data"
    with pytest.raises(
        KshotError,
        match=r"does not hold zoo as data.dvc names it \(its list of files missing\), .* not here either",
    ):
        versioning.push(there)
    with pytest.raises(KshotError, match=r"remote .*store did not give its list of files"):
        versioning.pull(there)
    take(there)
    assert versioning.push(there) == 3
    shutil.rmtree(local)  # what DVC remembers of a remote is not believed
    assert versioning.push(there) == 3
    next(local.rglob("*.dir")).unlink()
    [*_, last] = sorted(local.rglob("files/md5/*/*"), key=lambda file: file.stat().st_size)
    last.unlink()
    assert versioning.push(there) == 2
    last.chmod(0o644)
    last.write_bytes(b"torn")
    last.chmod(0o444)  # as DVC marks a file that it has verified
    with pytest.raises(KshotError, match=r"remote .*store does not hold index.json in full. What is there .* remove"):
        versioning.push(there)


def test_damage_is_mended_from_the_remote_if_the_copy_in_the_cache_is_damaged_too(project, local, take, flip):
    root = project / "data"
    take(root)
    versioning.record(root)
    versioning.push(root)
    flip(root / "zoo")
    for copy in (project / ".dvc" / "cache" / "files").rglob("*"):
        if copy.is_file() and copy.stat().st_size == (root / "zoo" / "images.npy").stat().st_size:
            copy.chmod(0o644)
            copy.write_bytes((root / "zoo" / "images.npy").read_bytes())
            copy.chmod(0o444)
    assert versioning.pull(root) == ["zoo"]
    ImageSet.open(root / "zoo").verify()


def test_nothing_is_called_pushed_that_is_not(project, take):
    root = project / "data"
    take(root)
    with pytest.raises(KshotError, match=r"names no data set: nothing is recorded yet.* kshot data commit"):
        versioning.push(root)
    versioning.record(root)
    with pytest.raises(KshotError, match=r"no DVC remote is configured.* dvc remote add"):
        versioning.push(root)
    with pytest.raises(KshotError, match=r"does not name goats; it names: zoo.* kshot data commit goats"):
        versioning.push(root, "goats")


def test_data_go_to_a_bucket_and_come_back(project, tmp_path, s3, git, commit, take):
    client, bucket = s3
    root = project / "data"
    take(root)
    versioning.record(root)
    commit(project)
    assert versioning.push(root) == 3
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 3
    assert versioning.push(root) == 0
    git(tmp_path, "clone", "-q", "project", "clone")
    there = tmp_path / "clone" / "data"
    assert versioning.ensure("zoo", there).how == "pulled"

    for each in client.list_objects_v2(Bucket=bucket)["Contents"]:
        client.delete_object(Bucket=bucket, Key=each["Key"])
    shutil.rmtree(there / "zoo")
    shutil.rmtree(tmp_path / "clone" / ".dvc" / "cache")
    with pytest.raises(KshotError, match=r"'zoo' .*the remote s3://.* did not give its list of files"):
        versioning.ensure("zoo", there)
    assert versioning.push(root) == 3  # an emptied bucket is filled again
    for each in client.list_objects_v2(Bucket=bucket)["Contents"]:
        client.delete_object(Bucket=bucket, Key=each["Key"])
    client.delete_bucket(Bucket=bucket)
    with pytest.raises(KshotError, match=r"the remote s3://bucket-.* could not be used: .*bucket does not exist"):
        versioning.push(root)


def test_without_the_extra_a_clone_still_builds_and_a_push_names_what_to_install(
    project, tmp_path, s3, monkeypatch, take
):
    root = project / "data"
    take(root)
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    versioning.record(root)
    with pytest.raises(KshotError, match=r's3://.* needs the Python package dvc-s3, .*: pip install "kshot\[s3\]"'):
        versioning.push(root)
    (tmp_path / "photos0").rename(tmp_path / "project" / "photos")
    shutil.rmtree(root / "zoo")
    shutil.rmtree(project / ".dvc" / "cache")
    monkeypatch.chdir(project)
    present = versioning.ensure("zoo", root, "photos")
    assert present.how == "built"
    assert "could not be pulled" in present.note
    assert 'pip install "kshot[s3]"' in present.note


@pytest.mark.parametrize(
    ("url", "extra"),
    [
        ("s3://bucket/path", "s3"),
        ("gs://bucket/path", "gs"),
        ("azure://container", "azure"),
        ("wasbs://container@account.example.org/path", "azure"),
        ("postgresql://ann:secret@127.0.0.1/mlflow", "postgres"),
        ("postgresql+psycopg://127.0.0.1/mlflow", "postgres"),
        ("sqlite:///mlflow.db", None),
        ("http://127.0.0.1:5000", None),
        ("/a/folder", None),
    ],
)
def test_a_url_whose_package_is_missing_names_its_extra(url, extra, monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    found = extras.missing(url)
    assert (found is None) == (extra is None)
    assert extra is None or f'pip install "kshot[{extra}]"' in found
    assert "secret" not in (found or "")


def test_the_packages_of_s3_and_postgres_are_here():
    assert extras.missing("s3://bucket") is extras.missing("s3://bucket", dvc=True) is None
    assert extras.missing("postgresql://127.0.0.1/mlflow") is None
