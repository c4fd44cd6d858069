"""The `kshot data` commands: import, list, show, verify, commit, remove, push, pull."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kshot_flows.console.tables import console, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kshot.data.importing import ImportReport, Progress

# Heavy imports wait until a command needs them: `kshot --help` must be quick.

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="""Import images as data sets, inspect them, and version them with DVC.

    A data set is a folder under [bold]data/[/bold] of the project (or under $KSHOT_DATA): all its images in one file,
    and an index of classes, splits and files. [bold]data.dvc[/bold], committed to git, names the version of each.
    """,
)

_SHOWN = 10  # lines of a long list


@app.callback()
def data() -> None:
    pass


@app.command(name="import")
def import_(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A folder, a zip, or a named source.", show_default=False)
    ],
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the data set.", show_default=False)],
    from_dir: Annotated[
        Path | None,
        typer.Option("--from", metavar="DIR", help="Folder with a named source's archives.", show_default=False),
    ] = None,
    size: Annotated[int | None, typer.Option(help="Side of the packed images, in pixels.", show_default=False)] = None,
    channels: Annotated[int | None, typer.Option(help="Channels: 1 is grey, 3 colour.", show_default=False)] = None,
    resize: Annotated[
        str | None, typer.Option(help="Resize filter: lanczos, bicubic, bilinear, box, nearest.", show_default=False)
    ] = None,
    fit: Annotated[
        str | None, typer.Option(help="How to make images square: squash, crop or pad.", show_default=False)
    ] = None,
    invert: Annotated[
        bool | None,
        typer.Option("--invert/--no-invert", help="Invert brightness, so that dark ink is bright.", show_default=False),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="A split of the named source; for folders, shares of train/val/test.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of a random split.")] = 0,
    min_images: Annotated[int, typer.Option(help="Skip classes with fewer images.", min=1)] = 2,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC", help="Group photos by folder, or by a file name pattern: {visit}_*.", show_default=False
        ),
    ] = None,
    allow_leaks: Annotated[
        bool, typer.Option("--allow-leaks", help="Accept identical files in different splits.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an existing data set of this name.")] = False,
) -> None:
    """Import images as a data set.

    Your own photos: a folder or zip with [bold]one folder per class[/bold], optionally inside train/, val/ and test/.
    Unsplit classes are split into train, val and test by --split, 0.6/0.2/0.2 by default:

    [cyan]kshot data import ./photos pets[/cyan]

    [cyan]kshot data import ./photos pets --size 64 --fit crop --split 0.8/0.1/0.1[/cyan]

    Photos of one visit, camera or patient look alike, which inflates accuracy. Group them by subfolder
    (photos/cats/visit1/a.jpg) or by a part of the file name; a recipe with [bold]dataset.across_groups=true[/bold]
    then draws the support and the queries of a class from different groups:

    [cyan]kshot data import ./photos pets --group-by folder[/cyan]

    [cyan]kshot data import ./photos pets --group-by "{visit}_*"[/cyan]

    A named source, downloaded or from a folder with its archives ([cyan]kshot data sources[/cyan] lists the names;
    KSHOT_MIRROR may name a folder with a subfolder per source):

    [cyan]kshot data import omniglot omniglot --split vinyals[/cyan]

    [cyan]kshot data import omniglot omniglot --from ~/downloads/omniglot[/cyan]

    Unusable files are listed with the reason. A failed import leaves nothing behind. In a DVC repository the data set
    is also recorded in data.dvc, as by [cyan]kshot data commit[/cyan].
    """
    from kshot.data.importing import import_dataset
    from kshot_flows.data import versioning

    fields = {"size": size, "channels": channels, "resize": resize, "fit": fit, "invert": invert}
    rule = {field: value for field, value in fields.items() if value is not None}
    events = import_dataset(
        source, name, versioning.data_root(),
        from_dir=from_dir, rule=rule, split=split, seed=seed, min_images=min_images, group_by=group_by,
        allow_leaks=allow_leaks, replace=replace,
    )  # fmt: skip
    _tell(watch(events, name))
    if versioning.versioned(versioning.data_root()):
        _record(name)


@app.command()
def sources() -> None:
    """List the named sources, with their splits and licences."""

    from kshot import plugins

    listed = table("source", "what it is", "splits", "licence")
    for provided in plugins.find().of("datasets"):
        importer = provided.value
        listed.add_row(provided.name, importer.about, "\n".join(importer.splits), importer.licence)
    console(markup=False).print(listed)


@app.command(name="list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the data sets of this project, and whether data.dvc records their present versions."""

    from kshot.data.datasets import ImageSet
    from kshot_flows.data import versioning
    from kshot_runtime.errors import KshotError

    root, rows = versioning.data_root(), []
    for name, state in versioning.state_of(root, read=False).items():
        row: dict[str, Any] = {"name": name, "state": state, "dvc": versioning.recorded(root, name)}
        with suppress(KshotError):  # missing, or cannot be opened
            found = ImageSet.open(root / name)
            row |= {"version": found.version, "images": len(found.images), "classes": found.splits}
            row |= {"size": found.rule.size, "channels": found.rule.channels, "licence": found.index.licence}
        rows.append(row)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    out = console(markup=False)
    if not rows:
        out.print(f"No data sets in {root} yet. Bring one in: kshot data import glyphs glyphs")
        return
    listed = table("data set", "images", "classes", "size", "version", "data.dvc")
    versioned = versioning.versioned(root)
    for row in rows:
        known = "version" in row
        classes = ", ".join(f"{split} {count}" for split, count in row.get("classes", {}).items())
        count, version = f"{row['images']:,}" if known else "", row.get("version", "")[:12]
        listed.add_row(
            row["name"],
            count,
            classes,
            _size(row["size"], row["channels"]) if known else "",
            version,
            row["state"] if versioned else "-",
        )
    out.print(listed)
    advice = {
        "changed": "Record it: kshot data commit", "not recorded": "Record it: kshot data commit",
        "missing": "Bring it here: kshot data pull", "damaged": "Bring back what was recorded: kshot data pull",
    }  # fmt: skip
    for wrong, what in advice.items() if versioned else ():
        if names := [row["name"] for row in rows if row["state"] == wrong]:
            out.print(f"{wrong}: {', '.join(names)}. {what} {' '.join(names)}", soft_wrap=True)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the data set.", show_default=False)],
) -> None:
    """Show the classes, images, source, licence and version of a data set, and the path of its contact sheet."""

    from kshot.data.datasets import SHEET, ImageSet
    from kshot_flows.data.versioning import data_root

    data_set = ImageSet.open(data_root() / name)
    index, out = data_set.index, console(markup=False)
    listed = table(name, "classes", "images", "images a class", "for example")
    for split in data_set.splits:
        classes = [c for c in data_set.classes if c.split == split]
        counts = [c.count for c in classes]
        spread = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        examples = ", ".join(c.name for c in classes[:3])
        listed.add_row(split, str(len(classes)), f"{sum(counts):,}", spread, examples)
    out.print(listed)
    out.print(
        f"each image  {_size(data_set.rule.size, data_set.rule.channels)}, {data_set.rule.fit}, {data_set.rule.resize}",
        soft_wrap=True,
    )
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
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only this data set.", show_default=False)
    ] = None,
) -> None:
    """Compare every byte of the images with the index, and the index with data.dvc; exit status 1 on damage."""

    from kshot.data.datasets import ImageSet
    from kshot_flows.data import versioning
    from kshot_runtime.errors import KshotError

    root, out, wrong = versioning.data_root(), console(markup=False), 0
    states = versioning.state_of(root, [name] if name else ())
    for each, state in states.items():
        try:
            data_set = ImageSet.open(root / each)
            data_set.verify()
            out.print(f"{each}: {len(data_set.images):,} images are as they were imported", soft_wrap=True)
        except KshotError as error:
            wrong += state == "damaged" or each == name
            out.print(f"{each}: {error}", soft_wrap=True)
        if state in ("changed", "missing", "not recorded") and versioning.versioned(root):
            out.print(f"not as in data.dvc: {each}: {state}", soft_wrap=True)
    if wrong:
        raise typer.Exit(1)


Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Only these data sets.", show_default=False)
]


@app.command()
def commit(names: Names = None) -> None:
    """Record the present versions of data sets in data.dvc: all data sets here, or those named.

    Each is verified first and copied into DVC's cache. Entries of data sets that are not here stay. Afterwards commit
    data.dvc with git, and [cyan]kshot data push[/cyan].
    """
    _record(*names or ())


@app.command()
def remove(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of data sets.", show_default=False)],
) -> None:
    """Remove data sets from data.dvc. Their files stay in the data folder, and earlier versions in git and DVC."""
    from kshot_flows.data import versioning

    root = versioning.data_root()
    versioning.remove(root, *names)
    typer.echo(f"{root.name}.dvc names {', '.join(names)} no more; files that are in {root} stay there.")


@app.command()
def push(names: Names = None) -> None:
    """Copy recorded data sets to the DVC remote, and verify that they arrived.

    To set up a remote: [cyan]dvc remote add -d store s3://bucket/path[/cyan]
    """
    from kshot_flows.data import versioning

    root = versioning.data_root()
    count = versioning.push(root, *names or ())
    states = versioning.state_of(root, read=False)
    named = ", ".join(names or (name for name, state in states.items() if state != "not recorded"))
    typer.echo(f"The remote has what {root.name}.dvc names of {named}: {count} files were new there.")
    if left := [name for name in names or states if states[name] in ("changed", "not recorded")]:
        them = f"{', '.join(left)} as {'it is' if len(left) == 1 else 'they are'} here"
        typer.echo(
            f"Not {them}: that is not recorded. To push it too: kshot data commit {' '.join(left)}; kshot data push"
        )


@app.command()
def pull(names: Names = None) -> None:
    """Fetch the versions of data sets that data.dvc names, from DVC's cache or remote: all, or those named.

    Damaged data sets are replaced. An unrecorded version is never overwritten.
    """
    from kshot_flows.data import versioning

    root = versioning.data_root()
    new = versioning.pull(root, *names or ())
    typer.echo(
        f"{', '.join(names or ['All data sets'])}: as {root.name}.dvc names them, verified. "
        f"Brought here: {', '.join(new) or 'nothing, as they were so'}."
    )


def _record(*names: str) -> None:
    from kshot_flows.data import versioning

    root = versioning.data_root()
    done = versioning.record(root, *names)
    for line in done.lines(root):
        typer.echo(line)
    if done.new or done.split:
        files = [f"{root.name}.dvc", ".dvcignore", ".gitattributes", ".gitignore"]
        keep = f"git add {' '.join(files)} && git commit; " if versioning.in_git(root) else ""
        typer.echo(f"To keep and share it: {keep}kshot data push")
    else:
        typer.echo(f"Nothing to record: {root.name}.dvc names {', '.join(names) or 'all data sets'} as here.")


def watch(events: Iterator[Progress | ImportReport], name: str) -> ImportReport:
    """Run an import to its end, with a progress bar in a terminal, and return its report."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from kshot.data.importing import ImportReport

    columns = (TextColumn("importing {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, TextColumn("{task.fields[what]}"), console=Console(stderr=True), transient=True) as bars:
        row = bars.add_task(name, total=None, what="")
        for event in events:
            if isinstance(event, ImportReport):
                return event
            bars.update(row, completed=event.done, total=event.total or None, what=event.what)
    raise AssertionError("an import ends with its report")


def _tell(report: ImportReport) -> None:

    out = console(markup=False)
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


def _size(size: int, channels: int) -> str:
    return f"{size} x {size} {'grey' if channels == 1 else 'colour'}"
