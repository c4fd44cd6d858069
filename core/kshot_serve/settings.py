"""Every knob of a server, with its unit, its range and why one would turn it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from kshot_runtime.images import ImageLimits

Accept = Annotated[float, Field(ge=0.5, le=0.999, allow_inf_nan=False)]
"""A share of known photos that a threshold is to let pass."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class EngineSettings(_Part):
    """How images of many requests share runs of onnxruntime."""

    device: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    threads: int = Field(0, ge=0, description="of onnxruntime for one run; 0: a runner's share of the cores")
    runners: int = Field(2, ge=1, description="runs at once on a CPU: while one computes, another is made ready")
    buckets: tuple[int, ...] = Field((1, 2, 4, 8, 16, 32), description="batch sizes; each is warmed before ready")
    queue: int = Field(
        256, ge=1, description="images at work, from decoding on; past that, and past one caller's `share` of it, 429"
    )
    wait_s: float = Field(2.0, gt=0, description="a request whose images would wait longer than this is refused, 429")
    decode_mp: int = Field(64, ge=1, description="megapixels of large photos decoded at once, of about 8 bytes each")
    deadline_s: float = Field(5.0, gt=0, description="an image that waits longer is answered 503 and never run")
    decoders: int = Field(0, ge=0, description="threads that decode photos; 0 takes the cores this process may use")
    states_mb: int = Field(512, ge=1, description="memory of a worker for adapted states; the least used go first")
    sessions_mb: int = Field(64, ge=0, description="for onnxruntime sessions with a state's weights built in; 0: none")


class Settings(_Part):
    """A server's settings. `kshot serve --help` has the ones that most people turn."""

    source: str = Field(description="a bundle, folder or zip, or models:/NAME@ALIAS of the MLflow registry")
    registry: str = Field("", description="address of the MLflow server that has the model; empty: MLFLOW_TRACKING_URI")
    folder: Path = Field(Path("serve"), description="where label spaces and the last good bundle lie")
    database: str = Field("", description="SQLAlchemy URL of the label spaces; empty: SQLite in the folder")
    photo_keys: str = Field("", description="a file or SQLAlchemy URL for keys to encrypt photos with; empty: plain")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one and says which")
    workers: int = Field(1, ge=1, le=256, description="processes that share the port: one computes in Python at a time")
    keys: Literal["auto", "required", "off"] = Field("auto", description="API keys: auto needs them beyond loopback")
    exposed: bool = Field(False, description="serve beyond loopback without keys: whoever reaches the port may do all")
    origins: tuple[str, ...] = Field((), description="web origins that may call (CORS); none by default")
    hosts: tuple[str, ...] = Field((), description="further names in a Host header; loopback's and `host` always go")
    keep_photos: bool = Field(True, description="keep originals; without them only what adapting needs is kept")
    strip_metadata: bool = Field(False, description="keep originals without EXIF, GPS, XMP, IPTC and comments")
    stale_s: float = Field(300.0, ge=0, description="how long to answer without the database, from what was last read")
    reserve_mb: int = Field(
        32, ge=0, description="of disk, kept beside SQLite's file so that a full disk takes deletions"
    )
    poll_s: float = Field(10.0, gt=0, description="how often the registry is asked for a new champion")
    candidate_s: float = Field(120.0, gt=0, description="longest time to fetch, load and warm a new version")
    unpinned: bool = Field(False, description="take a registered version without the hash of its bundle.json")
    drain_s: float = Field(25.0, ge=0, description="longest time to answer what was accepted after SIGTERM")
    leave_s: float = Field(1.0, ge=0, description="of those, how long new requests are still taken while not ready")
    accept: Accept | None = Field(
        None, description="share of known photos that thresholds let pass; none: the bundle's balance"
    )
    fill: tuple[Path, ...] = Field((), description="folders or zips of classes; each is a label space from the start")
    spaces: int = Field(100_000, ge=1, description="label spaces at most")
    space_mb: int = Field(512, ge=1, description="photos' bytes in one label space at most")
    photos: int = Field(32, ge=1, description="photos in one request at most")
    request_mp: int = Field(2000, ge=1, description="megapixels of the large photos of one request, or one import")
    import_s: float = Field(60.0, gt=0, description="for an imported label space, from when its body is here")
    body_mb: int = Field(64, ge=1, description="a request's body at most")
    bodies_mb: int = Field(512, ge=1, description="bodies of all requests that a worker has under way")
    body_s: float = Field(30.0, gt=0, description="for a request's body to arrive, and a second more for each 100 kB")
    stalled_s: float = Field(120.0, gt=0, description="an image that waits or runs so long makes the server not live")
    headers_s: float = Field(10.0, gt=0, description="longest time for a request's head to arrive")
    idle_s: float = Field(75.0, gt=0, description="a kept connection's longest pause; load balancers' own are 60 s")
    share: float = Field(
        0.5, gt=0, le=1, description="of bodies, answers, requests and the queue, for one key (without keys: address)"
    )
    answers_mb: int = Field(256, ge=1, description="answers above 64 kB that a worker has under way")
    unread_s: float = Field(30.0, gt=0, description="a client that reads nothing of an answer for so long is cut off")
    connections: int = Field(4096, ge=16, description="of a worker; fewer if the system's limit of files is lower")
    requests: int = Field(1024, ge=1, description="requests of all keys under way, those whose bodies are awaited too")
    requests_per_s: float = Field(0.0, ge=0, description="requests a second of one key; 10 s of them at once; 0: any")
    wrong_keys_per_s: float = Field(5.0, ge=0, description="unknown keys a second of one address, likewise; 0: any")
    image: ImageLimits = ImageLimits(max_pixels_whole=16_000_000)  # a screen of 5K has 14.7 million
    engine: EngineSettings = EngineSettings()

    @property
    def database_url(self) -> str:
        return self.database or f"sqlite:///{self.folder / 'spaces.db'}"

    @property
    def champions(self) -> Path:
        """The folder of the last good bundles."""
        return self.folder / "champions"

    @property
    def on_loopback(self) -> bool:
        return self.host in ("127.0.0.1", "::1", "localhost")

    @property
    def needs_keys(self) -> bool:
        return self.keys == "required" or (self.keys == "auto" and not self.on_loopback and not self.exposed)
