"""The command line: quick to answer, with messages that say what to do next, and no traceback for a user's mistake."""

import re
import shlex
import subprocess
import sys
from importlib.metadata import EntryPoint, version
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

from kshot import LearnerConfig, plugins
from kshot.plugins import Found, Provided
from kshot_flows import recipes
from kshot_flows.cli import algorithms, main
from kshot_flows.cli.algorithms import takes
from kshot_flows.report import figures
from kshot_runtime.errors import KshotError

HEAVY = ("torch", "prefect", "mlflow", "dvc", "onnx", "onnxruntime", "matplotlib", "numpy", "sqlalchemy", "fastapi")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def kshot(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    """The real command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from kshot_flows.cli.main import main; main()", *arguments],
        capture_output=True, text=True, timeout=120, **more,
    )  # type: ignore[call-overload, no-any-return]  # fmt: skip


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from kshot_flows.cli.main import app
app(["--help"], standalone_mode=False)
print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.split() == []


def test_help_lists_every_command_and_shows_a_first_run() -> None:
    shown = CliRunner().invoke(main.app, ["--help"]).output
    for command in (
        "run",
        "compare",
        "recipes",
        "schedule",
        "algorithms",
        "data",
        "models",
        "promote",
        "rollback",
        "history",
        "trace",
    ):
        assert command in shown
    assert "kshot run glyphs-protonet" in shown


@pytest.mark.parametrize("command", ["run", "compare", "schedule", "algorithms"])
def test_the_help_of_a_command_teaches_with_an_example(command: str) -> None:
    assert f"kshot {command} " in CliRunner().invoke(main.app, [command, "--help"]).output.split("Arguments")[0]


def test_version_says_which_kshot_this_is() -> None:
    assert CliRunner().invoke(main.app, ["--version"]).output == f"kshot {version('kshot')}\n"


def test_a_misspelt_command_is_answered_with_a_guess() -> None:
    done = CliRunner().invoke(main.app, ["algoritms"])
    assert done.exit_code == 2
    assert "no command 'algoritms'; did you mean 'algorithms'?" in done.stderr


def test_a_users_mistake_is_a_message_on_stderr_and_no_traceback(tmp_path: Path) -> None:
    done = kshot("run", "glyph-protonet", cwd=tmp_path)
    assert done.returncode == 1
    assert "no recipe 'glyph-protonet'; did you mean 'glyphs-protonet'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_errors_are_red_in_a_terminal_and_plain_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise KshotError("[dataset] is missing")

    monkeypatch.setattr(main, "app", fail)
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 1
    assert capsys.readouterr().err == "[dataset] is missing\n"  # brackets are no markup here


def test_recipes_are_listed_with_a_line_each() -> None:
    shown = CliRunner().invoke(main.app, ["recipes"]).output
    assert all(name in shown for name in recipes.recipes())
    assert "Prototypical networks" in shown


def test_a_recipe_can_be_printed_or_copied_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [line] = [line for line in CliRunner().invoke(main.app, ["recipes"]).output.splitlines() if "my.toml" in line]
    _, printed, copied = re.split("own of one: |, or ", line)
    file = Path(shlex.split(copied)[1])
    assert (file.is_absolute(), copied.split()[0], copied.split()[-1]) == (True, "cp", "my.toml")
    command = shlex.split(printed.removesuffix(" > my.toml"))
    assert CliRunner().invoke(main.app, command[1:]).output == file.read_text()
    with pytest.raises(KshotError, match="did you mean 'photos-finetune'"):
        CliRunner().invoke(main.app, ["recipes", "photo-finetune"], catch_exceptions=False)


def test_algorithms_shows_where_each_comes_from_and_its_idea() -> None:
    shown = CliRunner().invoke(main.app, ["algorithms"]).output
    [row] = [line for line in shown.splitlines() if line.strip().startswith("maml ")]
    assert version("kshot") in row
    assert "a few gradient steps" in row


def test_algorithms_shows_a_broken_plugin_as_broken_and_the_rest_as_well(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "odd_plugin.py").write_text("raise ValueError('neither [a] nor [/b]')")
    monkeypatch.syspath_prepend(tmp_path)
    points = [
        EntryPoint("protonet", "kshot_plugins.protonet", "kshot"),
        EntryPoint("mine", "no_such_module.mine", "kshot"),
        EntryPoint("odd", "odd_plugin", "kshot"),
    ]
    found = plugins.load(points)
    monkeypatch.setattr(plugins, "find", lambda: found)
    shown = CliRunner().invoke(main.app, ["algorithms"]).output
    [row] = [line for line in shown.splitlines() if line.strip().startswith("mine ")]
    assert "broken: ModuleNotFoundError" in row
    assert "broken: ValueError: neither [a] nor [/b]" in shown
    assert "protonet" in shown


def test_algorithms_with_a_name_explains_its_idea_its_paper_and_its_settings() -> None:
    shown = CliRunner().invoke(main.app, ["algorithms", "maml"]).output
    assert "a few gradient steps on the support set" in shown
    assert "arxiv.org/abs/1703.03400" in shown
    for setting in (
        r"rate +0\.04 +number > 0 ",
        r"eval_steps +unset +int ≥ 0 or table of ",
        r"first_order +false +true or",
    ):
        assert re.search(rf"^ *{setting}", shown, re.MULTILINE)
    config = plugins.find().learner("maml").value.Config
    for name, field in config.model_fields.items():
        assert re.search(rf"^ *{name} .*{re.escape(field.description or '')}", shown, re.MULTILINE)


def test_a_setting_that_only_has_another_default_means_what_the_inherited_one_means() -> None:
    maml = plugins.find().learner("maml").value

    class Mine(maml):  # type: ignore[valid-type]
        class Config(maml.Config):  # type: ignore[name-defined]
            steps: int = 7

    [(default, about)] = [(one[1], one[3]) for one in algorithms.settings(Mine.Config) if one[0] == "steps"]
    assert (default, about) == ("7", maml.Config.model_fields["steps"].description)


def test_algorithms_shows_the_committed_figures_beside_the_published_ones() -> None:
    shown = CliRunner().invoke(main.app, ["algorithms", "maml"]).output
    [first, *_] = figures.load().rows(learner="maml", data="omniglot")
    assert first.paper is not None
    row = " +".join(map(re.escape, ["5-way 1-shot", str(first.ours), first.paper.show("5w1s"), first.verdict]))
    assert re.search(row, shown)
    assert first.run.command in shown
    assert re.search("Recipes that use it: .*omniglot-maml", shown)


@pytest.mark.parametrize("name", ["maml", "protonet", "conv4"])
def test_what_algorithms_tells_fits_a_terminal_of_80_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = CliRunner().invoke(main.app, ["algorithms", name]).output
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown


def test_a_plugin_says_itself_what_it_is_good_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign:
        """Reads [palms] and [/hands].

        Good for fairs: it needs
        no training.
        """

        class Config(LearnerConfig):
            pass

    Foreign.__module__ = __name__
    one = Provided("learners", "palms", Foreign, "palms", "kshot-palms", "0.1")
    monkeypatch.setattr(plugins, "find", lambda: Found([one]))
    shown = CliRunner().invoke(main.app, ["algorithms", "palms"]).output
    assert "Reads [palms] and [/hands]." in shown
    assert "Good for fairs: it needs no training." in shown
    monkeypatch.setattr(sys.modules[__name__], "__doc__", None)
    listed = CliRunner().invoke(main.app, ["algorithms"]).output
    assert "Reads [palms] and [/hands]." in listed
    assert "Good for" not in listed


@pytest.mark.parametrize(
    ("annotation", "limits", "said"),
    [
        (int, Field(ge=1), "int ≥ 1"),
        (float, Field(gt=0), "number > 0"),
        (float, Field(ge=0, le=1), "number, 0 to 1"),
        (float, Field(ge=0, lt=1), "number ≥ 0 and < 1"),
        (float | None, Field(gt=0), "number > 0 or unset"),
        (Annotated[int, Field(ge=2)] | None, Field(), "int ≥ 2 or unset"),
        (tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1), "list of int ≥ 1"),
        (bool, Field(), "true or false"),
        (Literal["pool", "stride", "none"], Field(), '"pool", "stride" or "none"'),
    ],
)
def test_what_a_setting_takes_is_read_from_its_field(annotation: object, limits: FieldInfo, said: str) -> None:
    assert takes(annotation, limits.metadata) == said


def test_backbones_are_explained_too() -> None:
    shown = CliRunner().invoke(main.app, ["algorithms", "conv4"]).output
    assert "[backbone]" in shown
    assert "width" in shown


def test_an_unknown_algorithm_is_answered_with_a_guess() -> None:
    failed = CliRunner().invoke(main.app, ["algorithms", "protnet"]).exception
    assert isinstance(failed, KshotError)
    assert "did you mean 'protonet'?" in str(failed)


def test_a_schedule_that_names_no_time_is_refused_before_anything_starts() -> None:
    failed = CliRunner().invoke(main.app, ["schedule", "glyphs-protonet", "--cron", "every night"]).exception
    assert isinstance(failed, KshotError)
    assert "'every night' names no time" in str(failed)
