"""The command `kshot learn`: a folder of photos in, a model that is served in one more command out."""

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
            help="A folder or zip with a folder for each class, or a data set's name.",
            show_default=False,
        ),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Single values of the recipe to change.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Of the data set and the model; the folder's name if unset.", show_default=False)
    ] = None,
    heads: Annotated[
        str | None, typer.Option(help="Which to choose among, such as plda,whitened.", show_default=False)
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Such as timm/vit_small_patch14_dinov2.", show_default=False)
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="What photos belong together: folder, or {visit}_* of file names.", show_default=False
        ),
    ] = None,
    size: Annotated[int, typer.Option(help="Pixels a side that photos are packed at.", min=16)] = 224,
    recipe: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the recipe there, and stop.", show_default=False)
    ] = None,
    fill: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="Then make a label space with these photos at that server.", show_default=False
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(envvar="KSHOT_KEY", help="For --fill, where the server asks for one.", show_default=False),
    ] = None,
) -> None:
    """Learn to tell similar things apart from a few photos of each: minutes on a laptop, and no training.

    [cyan]kshot learn ./photos[/cyan]

    Imports the photos, embeds each once with a frozen pretrained backbone, chooses a head by cross-validation over
    classes, says how good it is on classes that took part in no choice, exports it, registers it, and says how to
    serve it. What was done before is used again.

    Photos of one visit, camera or patient flatter accuracy; say which belong together, and the figures keep them apart:

    [cyan]kshot learn ./photos --group-by "{visit}_*"[/cyan]

    A page that knows your classes, in two commands:

    [cyan]kshot learn ./photos[/cyan] and then [cyan]kshot serve models:/photos@production --space ./photos[/cyan]

    The same every night: write the recipe out, and schedule it.

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
