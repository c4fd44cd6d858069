"""The commands around data: import, list, show, verify, push, pull."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kshot_flows.console.tables import table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kshot.importing import ImportReport, Progress

# Heavy imports wait until a command needs them: `kshot --help` must be quick.

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Bring images in, look at them, keep their versions.

    A data set is a folder under [bold]data/[/bold] of the project (or under $KSHOT_DATA): all its images in one file,
    and an index of classes, splits and files. DVC versions the whole folder in [bold]data.dvc[/bold].
    """,
)

_SHOWN = 10  # lines of a long list


@app.callback()
def data() -> None:
    pass


@app.command(name="import")
def import_(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, a zip, or a source by name.", show_default=False)
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call the data set.", show_default=False)],
    from_dir: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="Where a named source's archives lie.", show_default=False),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the packed images, in pixels.", show_default=False)] = None,
    channels: Annotated[int | None, typer.Option(help="1 for grey, 3 for colour.", show_default=False)] = None,
    resize: Annotated[
        str | None, typer.Option(help="Filter: lanczos, bicubic, bilinear, box, nearest.", show_default=False)
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="What is not square: squash it, crop it, or pad it.", show_default=False)
    ] = None,
    invert: Annotated[
        bool | None, typer.Option("--invert/--no-invert", help="Make dark ink bright.", show_default=False)
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="One of the source's splits; for folders train/val/test shares.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of a random split.")] = 0,
    min_images: Annotated[int, typer.Option(help="Leave out classes with fewer.", min=1)] = 2,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="What photos belong together: folder, or {visit}_* of file names.", show_default=False
        ),
    ] = None,
    allow_leaks: Annotated[bool, typer.Option("--allow-leaks", help="Take equal files in two splits.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace the data set of that name.")] = False,
) -> None:
    """Pack images into a data set.

    Your own photos, [bold]a folder for each class[/bold], or train/, val/ and test/ with such folders in them; or a
    zip of that. Classes are split 0.6/0.2/0.2 into train, val and test unless you say otherwise:

    [cyan]kshot data import ./photos pets[/cyan]

    [cyan]kshot data import ./photos pets --size 64 --fit crop --split 0.8/0.1/0.1[/cyan]

    Photos of one visit, camera or patient resemble each other, which flatters accuracy. Say which belong together, by
    folders in those of the classes (photos/cats/visit1/a.jpg) or by a part of the file names, and a recipe with
    [bold]dataset.across_groups=true[/bold] takes the support and the queries of a class from different groups:

    [cyan]kshot data import ./photos pets --group-by folder[/cyan]

    [cyan]kshot data import ./photos pets --group-by "{visit}_*"[/cyan]

    A source by name, from its official archives or from a folder that has them ([cyan]kshot data sources[/cyan]
    lists the names; KSHOT_MIRROR may name a folder that holds a folder for each of them):

    [cyan]kshot data import omniglot omniglot --split vinyals[/cyan]

    [cyan]kshot data import omniglot omniglot --from ~/downloads/omniglot[/cyan]

    Files that cannot be used are listed with the reason. If anything fails, nothing is left behind.
    """
    from kshot.importing import import_dataset
    from kshot_flows.data.versioning import data_root

    fields = {"size": size, "channels": channels, "resize": resize, "fit": fit, "invert": invert}
    rule = {field: value for field, value in fields.items() if value is not None}
    events = import_dataset(
        source, name, data_root(),
        from_dir=from_dir, rule=rule, split=split, seed=seed, min_images=min_images, group_by=group_by,
        allow_leaks=allow_leaks, replace=replace,
    )  # fmt: skip
    _tell(watch(events, name))


@app.command()
def sources() -> None:
    """List the sources that have a name, with their splits."""
    from rich.console import Console

    from kshot import plugins

    listed = table("source", "what it is", "splits", "licence")
    for provided in plugins.find().of("datasets"):
        importer = provided.value
        listed.add_row(provided.name, importer.about, "\n".join(importer.splits), importer.licence)
    Console(markup=False).print(listed)


@app.command(name="list")
def list_() -> None:
    """List the data sets of this project."""
    from rich.console import Console

    from kshot.datasets import ImageSet, data_sets
    from kshot_flows.data import versioning

    root = versioning.data_root()
    names = data_sets(root)
    out = Console(markup=False)
    if not names:
        out.print(f"No data sets in {root} yet. Bring one in: kshot data import glyphs glyphs")
        return
    listed = table("data set", "images", "classes", "size", "version")
    for name in names:
        data_set = ImageSet.open(root / name)
        classes = ", ".join(f"{split} {count}" for split, count in data_set.splits.items())
        listed.add_row(name, f"{len(data_set.images):,}", classes, _size(data_set.rule), data_set.version[:12])
    out.print(listed)
    if md5 := versioning.recorded(root):
        out.print(f"data.dvc names this folder {md5}")
    for difference in versioning.differences(root):
        out.print(f"  since then: {difference}")


@app.command()
def show(name: Annotated[str, typer.Argument(metavar="NAME", help="Which one.", show_default=False)]) -> None:
    """Show what is in a data set, and where its contact sheet lies."""
    from rich.console import Console

    from kshot.datasets import SHEET, ImageSet
    from kshot_flows.data.versioning import data_root

    data_set = ImageSet.open(data_root() / name)
    index, out = data_set.index, Console(highlight=False, markup=False)
    listed = table(name, "classes", "images", "images a class", "for example")
    for split in data_set.splits:
        classes = [c for c in data_set.classes if c.split == split]
        counts = [c.count for c in classes]
        spread = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        examples = ", ".join(c.name for c in classes[:3])
        listed.add_row(split, str(len(classes)), f"{sum(counts):,}", spread, examples)
    out.print(listed)
    out.print(f"each image  {_size(data_set.rule)}, {data_set.rule.fit}, {data_set.rule.resize}", soft_wrap=True)
    out.print(f"from        {index.source}: {index.provenance}", soft_wrap=True)
    out.print(f"licence     {index.licence}", soft_wrap=True)
    if groups := sorted({f.group for f in index.files if f.group}):
        out.print(
            f"groups      {len(groups)}: {', '.join(groups[:_SHOWN])}{', ...' * (len(groups) > _SHOWN)}", soft_wrap=True
        )
    out.print(f"version     {data_set.version}", soft_wrap=True)
    out.print(f"sheet       {data_set.folder / SHEET}", soft_wrap=True)
    _list(out, f"Files that were not taken ({len(index.skipped)}):", [f"{s.name}: {s.why}" for s in index.skipped])
    _list(out, "Files that are equal to the byte:", [", ".join(group) for group in index.duplicates])


@app.command()
def verify(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Only this one.", show_default=False)] = None,
) -> None:
    """Read every image file again, compare it with its index, and the data folder with data.dvc."""
    from rich.console import Console

    from kshot.datasets import ImageSet, data_sets
    from kshot_flows.data import versioning
    from kshot_runtime.errors import KshotError

    root, out, wrong = versioning.data_root(), Console(highlight=False, markup=False), 0
    for each in data_sets(root) if name is None else [name]:
        try:
            data_set = ImageSet.open(root / each)
            data_set.verify()
            out.print(f"{each}: {len(data_set.images):,} images are as they were imported", soft_wrap=True)
        except KshotError as error:
            wrong += 1
            out.print(f"{each}: {error}", soft_wrap=True)
    for difference in versioning.differences(root):
        out.print(f"not as in data.dvc: {difference}", soft_wrap=True)
    if wrong:
        raise typer.Exit(1)


@app.command()
def push() -> None:
    """Copy the recorded data to the DVC remote.

    Set one up once, for example in a bucket: [cyan]dvc remote add -d store s3://bucket/path[/cyan]
    """
    from kshot_flows.data import versioning

    count = versioning.push(versioning.data_root())
    typer.echo(f"Files that were new to the remote: {count}." if count else "The remote has everything already.")


@app.command()
def pull() -> None:
    """Fetch from the DVC remote what data.dvc names."""
    from kshot_flows.data import versioning

    root = versioning.data_root()
    versioning.pull(root)
    typer.echo(f"{root} is what {root.name}.dvc names.")


def watch(events: Iterator[Progress | ImportReport], name: str) -> ImportReport:
    """Let an import run, with a progress bar in a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from kshot.importing import ImportReport

    columns = (TextColumn("importing {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, TextColumn("{task.fields[what]}"), console=Console(stderr=True), transient=True) as bars:
        row = bars.add_task(name, total=None, what="")
        for event in events:
            if isinstance(event, ImportReport):
                return event
            bars.update(row, completed=event.done, total=event.total or None, what=event.what)
    raise AssertionError("an import ends with its report")


def _tell(report: ImportReport) -> None:
    from rich.console import Console

    out = Console(highlight=False, markup=False)
    classes = ", ".join(f"{count} {split}" for split, count in report.splits.items())
    out.print(
        f"{report.images:,} images of {sum(report.splits.values())} classes ({classes}) in {report.folder}",
        soft_wrap=True,
    )
    _list(out, f"Files that were not taken ({len(report.skipped)}):", [f"{s.name}: {s.why}" for s in report.skipped])
    if report.groups:
        out.print(f"groups a class: {min(report.groups.values())} to {max(report.groups.values())}")
    leaks = [", ".join(group) for group in report.leaks]
    _list(
        out,
        "Images in more than one split, so that a test would see what was trained:",
        leaks,
    )
    _list(
        out,
        "Files that are equal to the byte:",
        [", ".join(group) for group in report.duplicates if group not in report.leaks],
    )
    out.print(f"Look at it: {report.sheet}", soft_wrap=True)


def _list(out: Any, title: str, lines: list[str]) -> None:
    if not lines:
        return
    out.print(title, soft_wrap=True)
    for line in lines[:_SHOWN]:
        out.print(f"  {line}", soft_wrap=True)
    if len(lines) > _SHOWN:
        out.print(f"  and {len(lines) - _SHOWN} more: see index.json", soft_wrap=True)


def _size(rule: Any) -> str:
    return f"{rule.size} x {rule.size} {'grey' if rule.channels == 1 else 'colour'}"
