"""The commands for the server: `serve`, and `keys` with new, list and revoke."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from kshot_serve.storage.keys import Keys

# onnxruntime, FastAPI and SQLAlchemy take a second to import: every command imports what it needs.

Folder = Annotated[Path, typer.Option(help="Folder for label spaces, keys and the last good bundle.")]
Database = Annotated[
    str,
    typer.Option(
        metavar="URL", envvar="KSHOT_DATABASE", show_envvar=True,
        help="SQLAlchemy URL for label spaces and keys; by default SQLite in the folder.",
    ),
]  # fmt: skip

keys = typer.Typer(no_args_is_help=True, rich_markup_mode="rich", help="Create, list and revoke the server's API keys.")


def add_commands(app: typer.Typer) -> None:
    """Make these functions commands of `app`."""
    app.command()(serve)
    app.add_typer(keys, name="keys")


def serve(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A bundle (folder or zip), or models:/NAME@production.", show_default=False
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every interface.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.")] = 8000,
    workers: Annotated[
        int, typer.Option(min=1, metavar="N", help="Processes that share the port; for small photos, one per core.")
    ] = 1,
    space: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="CLASSES",
            help="Create a label space from a folder or zip with one folder per class; repeatable.",
            show_default=False,
        ),
    ] = None,
    folder: Folder = Path("serve"),
    database: Database = "",
    photo_keys: Annotated[
        str,
        typer.Option(
            metavar="FILE|URL",
            envvar="KSHOT_PHOTO_KEYS",
            show_envvar=True,
            show_default=False,
            help="Encrypt each photo with a key kept here (SQLite or Postgres), which deletion destroys.",
        ),
    ] = "",
    device: Annotated[
        Literal["cpu", "cuda", "tensorrt"], typer.Option(help="Device for the model; a missing one is an error.")
    ] = "cpu",
    queue: Annotated[
        int, typer.Option(min=1, metavar="IMAGES", help="Images at work at most; one key or address may hold half.")
    ] = 256,
    wait: Annotated[
        float, typer.Option(metavar="SECONDS", help="Refuse a request (429) whose photos would wait longer than this.")
    ] = 2.0,
    keep_photos: Annotated[
        Literal["yes", "no"], typer.Option(help="Store original photos, or only what adapting needs.")
    ] = "yes",
    strip_metadata: Annotated[
        bool, typer.Option("--strip-metadata", help="Store photos without EXIF, GPS, XMP, IPTC and comments.")
    ] = False,
    keys: Annotated[
        Literal["auto", "required", "off"],
        typer.Option(help="API keys: auto requires them unless only this machine can connect."),
    ] = "auto",
    exposed: Annotated[
        bool, typer.Option("--exposed", help="Allow other machines without keys: anyone who connects may do anything.")
    ] = False,
    origin: Annotated[
        list[str] | None, typer.Option(metavar="URL", help="Web origin allowed by CORS; repeatable.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Additional host name to accept in requests; repeatable.")
    ] = None,
    unpinned: Annotated[
        bool, typer.Option("--unpinned", help="Accept registered versions without the hash of their bundle.json.")
    ] = False,
    accept: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of known photos to accept, 0.5 to 0.999; by default both errors are balanced.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Serve a bundle over HTTP: a web page at /, a REST API at /v1, the Open Inference Protocol at /v2.

    A local bundle; then open the printed address:

    [cyan]kshot serve ./bundle[/cyan]

    With a label space named fruit, one class per subfolder:

    [cyan]kshot serve ./bundle --space ./fruit[/cyan]

    The production version, followed through promotions without a restart:

    [cyan]kshot serve models:/glyphs-protonet@production[/cyan]

    For clients on the network, which need an API key (`kshot keys new NAME`):

    [cyan]kshot serve ./bundle --host 0.0.0.0 --allow-host vision.example.com[/cyan]
    """
    from kshot_serve.server import workers as several

    several.serve(
        _settings(
            source=source,
            registry=_registry(source),
            host=host,
            port=port,
            workers=workers,
            fill=tuple(space or ()),
            folder=folder,
            database=database,
            photo_keys=photo_keys,
            engine={"device": device, "queue": queue, "wait_s": wait},
            keep_photos=keep_photos == "yes",
            strip_metadata=strip_metadata,
            keys=keys,
            exposed=exposed,
            origins=tuple(origin or ()),
            hosts=tuple(allow_host or ()),
            unpinned=unpinned,
            accept=accept,
        )
    )


@keys.command("new")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Owner or purpose of the key.", show_default=False)],
    scope: Annotated[
        Literal["read", "write", "admin"],
        typer.Option(help="read: classify; write: also change label spaces; admin: also export, import, delete them."),
    ] = "read",
    space: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ID_OR_NAME",
            help="The only label space that the key sees; repeatable. By default it sees all, and may create more.",
            show_default=False,
        ),
    ] = None,
    expires: Annotated[
        str, typer.Option(metavar="SPAN", help="When the key ends: 12h, 90d or 52w from now; by default never.")
    ] = "",
    owner: Annotated[str, typer.Option(help="Who has the key; shown by `kshot keys list`.")] = "",
    note: Annotated[str, typer.Option(help="Anything else to remember about the key.")] = "",
    folder: Folder = Path("serve"),
    database: Database = "",
) -> None:
    """Create an API key and print it once; only its hash is stored.

    [cyan]kshot keys new shop-website --scope read[/cyan]

    Only for one label space, for three months:

    [cyan]kshot keys new shop-website --scope write --space fruit --expires 90d --owner ann[/cyan]

    Clients send it as [cyan]Authorization: Bearer kshot_...[/cyan]
    """
    key, text = _keys(folder, database).new(name, scope, spaces=space or (), expires=expires, owner=owner, note=note)
    typer.echo(text)
    typer.echo(
        f"This is the only time that it is shown. Its id is {key.id}; `kshot keys revoke {key.id}` ends it.", err=True
    )


@keys.command("list")
def list_(folder: Folder = Path("serve"), database: Database = "") -> None:
    """List API keys: ids, names, scopes, label spaces, owners and times; the keys themselves are not stored.

    [cyan]kshot keys list[/cyan]
    """
    from rich import box
    from rich.table import Table

    found = _keys(folder, database).all()
    if not found:
        typer.echo("No keys yet. `kshot keys new NAME` makes one.")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("id", "name", "scope", "label spaces", "owner", "note", "made", "expires", "revoked"):
        table.add_column(column, overflow="fold")
    for key in found:
        spaces = "all" if key.spaces is None else "\n".join(sorted(key.spaces))
        times = (_day(key.created), _day(key.expires), _day(key.revoked))
        table.add_row(key.id, key.name, key.scope, spaces, key.owner, key.note, *times)
    from kshot_flows.console.tables import console

    console().print(table)


@keys.command("revoke")
def revoke(
    key: Annotated[str, typer.Argument(metavar="ID", help="As `kshot keys list` shows it.", show_default=False)],
    folder: Folder = Path("serve"),
    database: Database = "",
) -> None:
    """Revoke an API key. Running servers apply it within five seconds.

    [cyan]kshot keys revoke 3f8k2m1q0z[/cyan]
    """
    revoked = _keys(folder, database).revoke(key)
    typer.echo(f"{revoked.id} ({revoked.name}, {revoked.scope}) opens nothing any more.")


def _settings(**given: Any) -> Any:
    from pydantic import ValidationError

    from kshot_runtime.errors import KshotError
    from kshot_serve.settings import Settings

    try:
        return Settings(**given)
    except ValidationError as error:
        faults = (
            f"--{'-'.join(map(str, fault['loc']))}: {fault['msg']}, not {fault['input']!r}" for fault in error.errors()
        )
        raise KshotError("; ".join(faults)) from None


def _keys(folder: Path, database: str) -> Keys:
    from kshot_serve.storage.keys import Keys
    from kshot_serve.storage.store import Store

    return Keys(Store(_settings(source="", folder=folder, database=database).database_url))


def _registry(source: str) -> str:
    """The project's own MLflow store, if a registry is followed and no other store is set; None if there is none."""
    import os

    if not source.startswith("models:") or os.environ.get("MLFLOW_TRACKING_URI"):
        return ""
    from kshot_flows import project

    database = project.home() / "mlflow" / "mlflow.db"
    return f"sqlite:///{database}" if database.exists() else ""


def _day(when: Any) -> str:
    return when.astimezone().strftime("%Y-%m-%d %H:%M") if when else ""
