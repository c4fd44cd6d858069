"""Artifacts in a bucket, by moto's S3, and databases by URL: what they need is there, or named in a sentence."""

from pathlib import Path

import pytest

from kshot_flows.data import extras
from kshot_flows.tracking import runs, stores
from kshot_runtime.errors import KshotError

DATA = runs.DataRef("toy", "f" * 64, "0" * 32 + ".dir", "drawn")


def test_artifacts_go_to_a_bucket(
    project: Path, s3_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import boto3

    for name, value in (
        ("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_DEFAULT_REGION", "us-east-1"),
        ("MLFLOW_S3_ENDPOINT_URL", s3_server),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=s3_server)
    client.create_bucket(Bucket="artifacts")
    stores.client().create_experiment("in-a-bucket", artifact_location="s3://artifacts/mlflow")
    with runs.run("in-a-bucket", recipe={"lr": 1}, data=DATA, seed=1) as run:
        run.text("note.txt", "kept")
    [key] = [
        each["Key"] for each in client.list_objects_v2(Bucket="artifacts")["Contents"] if "note.txt" in each["Key"]
    ]
    assert client.get_object(Bucket="artifacts", Key=key)["Body"].read() == b"kept"
    client.close()

    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with (
        pytest.raises(KshotError, match=r'needs the Python package boto3, .*: pip install "kshot\[s3\]"'),
        runs.run("in-a-bucket", recipe={}, data=DATA, seed=1),
    ):
        pass


def test_a_database_whose_driver_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://ann:secret@127.0.0.1:9/mlflow")
    monkeypatch.setattr(extras, "find_spec", lambda name: None)
    with pytest.raises(KshotError, match=r'127.0.0.1:9/mlflow needs .* psycopg2, .*: pip install "kshot\[postgres\]"'):
        stores.uri()
