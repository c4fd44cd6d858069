"""The command `kshot learn`: from a folder of photos to a registered model, without training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from kshot_flows.cli.run import prepare_prefect
from kshot_runtime.errors import KshotError


def add_commands(app: typer.Typer) -> None:
    app.command()(learn)


def learn(
    source: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="A folder or zip with one folder per class, or the name of an imported data set.",
            show_default=False,
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Recipe values to override, such as seed=2.", show_default=False),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="Name of the data set and the model; by default the folder's.", show_default=False),
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Candidate heads, comma-separated: plda,whitened.", show_default=False)
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Backbone, such as timm/vit_small_patch14_dinov2.", show_default=False)
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="Group photos by folder, or by a file name pattern: {visit}_*.", show_default=False
        ),
    ] = None,
    size: Annotated[int, typer.Option(help="Side in pixels that photos are resized to.", min=16)] = 224,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the recipe to this file and exit.", show_default=False)
    ] = None,
    fill: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Then create a label space with these photos on this server.", show_default=False
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(envvar="KSHOT_KEY", help="API key of the --fill server.", show_default=False),
    ] = None,
) -> None:
    """Make a few-shot classifier from a folder of photos: no training, minutes on a laptop.

    [cyan]kshot learn ./photos[/cyan]

    Imports the photos, embeds each once with a frozen pretrained backbone, selects a head by cross-validation over
    classes, reports accuracy on held-out classes, exports to ONNX and registers the model. Unchanged steps are reused.

    Photos of one visit, camera or patient look alike, which inflates accuracy. Group them, and support and query
    photos come from different groups:

    [cyan]kshot learn ./photos --group-by "{visit}_*"[/cyan]

    Then serve a web page that knows your classes:

    [cyan]kshot serve models:/photos@production --space ./photos[/cyan]

    To repeat it every night, write the recipe to a file and schedule it:

    [cyan]kshot learn ./photos --recipe photos.toml[/cyan]

    [cyan]kshot schedule photos.toml --cron "0 3 * * *"[/cyan]
    """
    prepare_prefect()
    from kshot_flows.console import progress
    from kshot_flows.report import summary
    from kshot_flows.run import learn as learning
    from kshot_flows.run import start

    if fill and not Path(source).exists():
        raise KshotError(f"--fill takes the photos from a folder or zip, and there is none at {source!r}")
    photos = learning.bring_in(source, name, group_by, size)
    chosen = [one.strip() for one in heads.split(",")] if heads else []
    settings = [*learning.changes(photos, chosen, backbone, bool(group_by)), *(changes or [])]
    if recipe is not None:
        learning.write_recipe(settings, recipe)
        typer.echo(f"{recipe} is written. Run it: kshot run {recipe}")
        return
    if not start.unchanged(learning.RECIPE, settings):
        learning.announce(photos, settings)
    again = shlex.join(["kshot", "run", learning.RECIPE, *settings])
    try:
        done = start.run(learning.RECIPE, settings)
    except KeyboardInterrupt:
        raise KshotError(f"Stopped. What was finished is kept; go on with: {again}") from None
    summary.show(done, again)
    for sentence in learning.advice(photos):
        progress.say(f"[bold]More[/bold]         {sentence}")
    if Path(source).exists():
        progress.say(f"[bold]Its page[/bold]     kshot serve {summary.served(done)} --space {shlex.quote(source)}")
    if fill:
        learning.fill(fill, key, source, photos.name)
