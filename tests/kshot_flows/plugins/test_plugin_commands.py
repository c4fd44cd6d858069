"""`kshot plugin`: a new project is whole or absent, and a broken promise is told so that an author can mend it."""

import ast
import re
import shutil
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from kshot import plugins, testing
from kshot_flows.cli import main
from kshot_flows.plugins import check as plugin_check
from kshot_flows.plugins import project as plugin_project
from kshot_runtime.errors import KshotError

SLOW = "learns_a_toy_problem", "more_shots_never_cost_accuracy", "onnx_agrees_with_torch"
QUICK = [check for check in testing.CHECKS if check.__name__ not in SLOW]

SOUND = '''"""Means of classes, for tests of the kit."""
import torch
from kshot import InnerLoop, Learner, LearnerConfig, class_means, cross_entropy, hookimpl, one_hot, squared_distances

class Mine(Learner):
    name = "mine"
    class Config(LearnerConfig):
        power: int = 2
    def adapt(self, support, labels, classes):
        features, statistics = self.measure(support)
        return {"means": class_means(features, labels, classes), **statistics}
    def classify(self, state, query):
        features = self.embed(query, state)
        return -squared_distances(features, state["means"])

@hookimpl
def kshot_learners(): return [Mine]
'''

HEAD = '''"""Means of classes, as a head on features."""
import torch
from kshot import FeatureLearner, FeatureLoop, class_means, gradient, hookimpl, squared_distances

class Mine(FeatureLearner):
    name = "mine"
    def fit(self, features, labels, classes):
        return {"means": class_means(features, labels, classes)}
    def logits(self, state, features):
        return -squared_distances(features, state["means"])

@hookimpl
def kshot_learners(): return [Mine]
'''

FIT = 'return {"means": class_means(features, labels, classes)}'
RETURN = 'return {"means": class_means(features, labels, classes), **statistics}'
LOGITS = 'return -squared_distances(features, state["means"])'


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Install a plugin for the length of a test: the sound one, with parts of its text replaced."""
    (tmp_path / "plugins").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "plugins")
    monkeypatch.setenv("COLUMNS", "200")
    real = plugins.find()

    def install(*changes: tuple[str, str], source: str = SOUND) -> Path:
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        file = tmp_path / "plugins" / f"plugin_of_{tmp_path.name}.py"
        file.write_text(source)
        found = plugins.load([EntryPoint("mine", file.stem, "kshot")])
        both = plugins.Found(real.provided + found.provided, found.broken)
        monkeypatch.setattr(plugins, "find", lambda: both)
        return file

    return install


def kshot(*arguments: str) -> Result:
    return CliRunner().invoke(main.app, ["plugin", *arguments])


def failure(tmp_path: Path, check: str) -> plugin_check.Failure:
    """What this check finds wrong with `mine`."""
    [chosen] = [each for each in testing.CHECKS if each.__name__ == check]
    found = plugin_check.run(chosen, plugin_check.subject("mine", [], tmp_path)).failure
    assert found
    return found


# A new project


def test_a_new_project_has_every_file_under_the_new_name_and_says_what_to_do_next(tmp_path: Path) -> None:
    shown = kshot("new", "my-net", "--into", str(tmp_path))
    assert shown.exit_code == 0
    folder = tmp_path / "my-net"
    assert {path.name for path in folder.iterdir()} == {
        "kshot_my_net.py", "my-net.toml", "test_my_net.py", "pyproject.toml", "README.md", ".gitignore",
    }  # fmt: skip
    text = "".join(path.read_text() for path in folder.iterdir())
    assert "nearest" not in text.lower()
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"] == "kshot-my-net"
    assert project["entry-points"]["kshot"] == {"my-net": "kshot_my_net"}
    assert tomllib.loads((folder / "my-net.toml").read_text())["learner"]["name"] == "my-net"
    assert "class MyNet(FeatureLearner):" in text
    for command in ("pip install -e .", "kshot plugin check my-net", "kshot run my-net.toml", "pytest"):
        assert command in shown.output


def test_the_starter_has_the_files_that_are_written_and_no_other() -> None:
    assert {path.name for path in plugin_project.STARTER.iterdir() if path.is_file()} == set(plugin_project.FILES)


@pytest.mark.parametrize("name", ["a", "net2", "a-b_c", "dict", "match"])
def test_an_odd_name_still_gives_a_module_that_python_reads(name: str, tmp_path: Path) -> None:
    for path in plugin_project.create(name, tmp_path):
        if path.suffix == ".py":
            ast.parse(path.read_text())


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("My Net", "did you mean 'my-net'?"),
        ("3net", "begins with a letter"),
        ("net--2", "did you mean 'net-2'?"),
        ("../net", "did you mean 'net'?"),
        ("", "cannot name a plugin"),
        ("class", "keyword of Python"),
        ("none", "keyword of Python"),
        ("learner", "would hide what a plugin imports"),
        ("kshot-net", "kshot plugin new net"),
        ("torch", "distribution torch"),
        ("kshot", "distribution kshot"),
        ("random", "a Python module random"),
        ("serve", "a Python module kshot_serve"),
        ("protonet", "learner 'protonet' from plugin 'protonet' (kshot"),
        ("conv4", "backbone 'conv4'"),
        ("glyphs", "dataset 'glyphs'"),
    ],
)
def test_a_name_that_cannot_be_or_is_taken_is_refused_and_nothing_is_written(
    name: str, why: str, tmp_path: Path
) -> None:
    refused = kshot("new", name, "--into", str(tmp_path))
    assert isinstance(refused.exception, KshotError)
    assert why in str(refused.exception)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "net").mkdir()
    with pytest.raises(KshotError, match="net exists already"):
        plugin_project.create("net", tmp_path)
    assert not list((tmp_path / "net").iterdir())


def test_a_place_that_is_missing_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(KshotError, match=r"there is no folder .*nowhere"):
        plugin_project.create("net", tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_to_is_a_message() -> None:
    with pytest.raises(KshotError, match=r"cannot write /proc/net2: .*--into FOLDER"):
        plugin_project.create("net2", Path("/proc"))


def test_a_disk_that_fills_up_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starter = tmp_path / "starter"
    shutil.copytree(plugin_project.STARTER, starter)
    (starter / "README.md").unlink()  # the writing breaks off halfway
    monkeypatch.setattr(plugin_project, "STARTER", starter)
    (tmp_path / "here").mkdir()
    with pytest.raises(KshotError, match="Nothing is left of it"):
        plugin_project.create("net", tmp_path / "here")
    assert not list((tmp_path / "here").iterdir())


# Checking one


def test_a_sound_learner_passes_with_a_line_for_each_promise_in_words(
    installed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(('name = "mine"', 'name = "mine"\n    batched = False'))
    monkeypatch.setattr(testing, "CHECKS", QUICK)
    shown = kshot("check", "mine")
    assert shown.exit_code == 0
    assert shown.output.count("passed") == len(QUICK) - 1
    assert "A query gets the same logits alone as in a batch." in shown.output
    assert "`batched = False`: its episodes run one by one" in shown.output
    assert f"mine keeps {len(QUICK) - 1} promises, and is exempt from 1." in shown.output


def test_a_head_on_features_keeps_every_promise(
    installed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(source=HEAD)
    monkeypatch.setattr(testing, "CHECKS", QUICK)
    shown = kshot("check", "mine")
    assert shown.exit_code == 0
    assert f"mine keeps all {len(QUICK)} promises." in shown.output


BROKEN_PROMISES = {
    "it changes a buffer": (
        [(RETURN, f"next(self.backbone.buffers()).add_(1); {RETURN}")],
        "adapting_leaves_the_learner_as_it_was",
        "adapting or classifying changed backbone.",
        "Return what adapting learns in the state",
    ),
    "it remembers": (
        [(RETURN, f"self.means = class_means(features, labels, classes); {RETURN}"), ('state["means"]', "self.means")],
        "adapting_leaves_the_learner_as_it_was",
        "adapting to another episode changed the logits of an earlier state",
        "nothing else may pass from `adapt` to `classify`",
    ),
    "it draws": (
        [(RETURN, f"features = features + torch.randn_like(features); {RETURN}")],
        "adapting_leaves_the_learner_as_it_was",
        "the same episode gave other logits the second time",
        "Use no random numbers",
    ),
    "its ways are five": (
        [("class_means(features, labels, classes)", "class_means(features, labels, torch.arange(5))")],
        "any_ways_and_uneven_shots_fit",
        "2 ways gave logits (4, 5)",
        "classes.shape[0]",
    ),
    "the order of the support set matters": (
        [(RETURN, f"features = features * torch.linspace(0, 1, len(features))[:, None]; {RETURN}")],
        "order_of_the_support_set_does_not_matter",
        "another support order: logits differ by",
        "sums, means, maxima",
    ),
    "the first class is its favourite": (
        [(LOGITS, f"{LOGITS} - torch.arange(len(state['means']))")],
        "permuting_the_classes_permutes_the_logits",
        "classes in another order: logits differ by",
        "Treat every class alike",
    ),
    "a query's companions matter": (
        [(LOGITS, f"features = features - features.mean(0); {LOGITS}")],
        "one_query_does_not_depend_on_its_companions",
        "a query by itself: logits differ by",
        "never over the queries",
    ),
    "it knows that queries come class by class": (
        [(LOGITS, f"{LOGITS} + 99 * torch.eye(len(state['means'])).repeat_interleave(len(query) // 5, 0)")],
        "accuracy_without_information_is_chance",
        "shuffled support labels: accuracy 1.000, chance is 0.2",
        "Something other than the labels tells the classes apart",
    ),
    "its settings are loose": (
        [("LearnerConfig)", "LearnerConfig, extra='ignore')")],
        "config_round_trips",
        "Config must be frozen and refuse unknown keys; derive it from kshot.LearnerConfig",
        "",
    ),
    "a number leaves the graph": (
        [(LOGITS, f"{LOGITS} / state['means'].norm().item()")],
        "meta_gradient_agrees_with_finite_differences",
        "the gradient says",
        ".item()",
    ),
    "it returns no dict": (
        [(RETURN, "return class_means(features, labels, classes)")],
        "state_is_flat_and_logits_are_finite",
        "adapt must return a dict of tensors; it returned a Tensor",
        "",
    ),
    "it forgets to return": (
        [(LOGITS, LOGITS.removeprefix("return "))],
        "state_is_flat_and_logits_are_finite",
        "classify must return a tensor; it returned None",
        "",
    ),
}


@pytest.mark.parametrize("how", BROKEN_PROMISES)
def test_a_broken_promise_is_told_with_what_was_seen_and_what_to_do(
    how: str, installed: Callable[..., Path], tmp_path: Path
) -> None:
    changes, check, words, advice = BROKEN_PROMISES[how]
    installed(*changes)
    found = failure(tmp_path, check)
    assert words in found.what
    assert advice in found.advice
    assert found.where == ""  # nothing was raised in the author's code


BROKEN_HEADS = {
    "it returns no dict": (
        [(FIT, "return class_means(features, labels, classes)")],
        "state_is_flat_and_logits_are_finite",
        "fit must return a dict of tensors; it returned a Tensor",
    ),
    "it forgets to return": (
        [(LOGITS, LOGITS.removeprefix("return "))],
        "state_is_flat_and_logits_are_finite",
        "logits must return a tensor; it returned None",
    ),
    "it sees the query itself": (
        [
            ("def logits", "def classify(self, state, query): return self.logits(state, self.embed(query, state)) "
             "* (1 + query.flatten(1).mean(1, keepdim=True))\n    def logits"),
        ],
        "a_query_is_seen_through_embed_only",
        "a query's features in its place: logits differ by",
    ),
    "it forgets the statistics of the support set": (
        [("def fit", "def adapt(self, support, labels, classes): return self.fit(self.embed(support), labels, classes)"
          "\n    def fit")],
        "one_query_does_not_depend_on_its_companions",
        "with [backbone] norm = 'support'",
    ),
    "a number leaves the graph": (
        [(FIT, "features = features * features.mean().item(); " + FIT)],
        "episodes_of_a_batch_are_fitted_as_one_by_one",
        ".item()",
    ),
    "under vmap it is another": (
        [(FIT, "features = features.clone(); features[torch.rand(len(features)) < 0.5] = 0; " + FIT)],
        "episodes_of_a_batch_are_fitted_as_one_by_one",
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN_HEADS)
def test_a_promise_that_a_head_breaks_is_told_in_the_words_of_a_head(
    how: str, installed: Callable[..., Path], tmp_path: Path
) -> None:
    changes, check, words = BROKEN_HEADS[how]
    installed(*changes, source=HEAD)
    assert words in failure(tmp_path, check).what


LEARNS = """
    def __init__(self, backbone, config):
        super().__init__(backbone, config)
        self.register_buffer("scale", torch.ones(backbone.features))
    def learn_statistics(self, base):
        self.scale = STATISTICS
    def fit"""

BROKEN_STATISTICS = {
    "they depend on the order of the base classes": (
        "next(iter(base)).std(0)",
        "base classes in another order: logits differ by",
    ),
    "they are drawn": ("torch.rand(self.backbone.features)", "base classes in another order: logits differ by"),
    "they are no numbers": ("self.scale.log() / 0", "learn_statistics set the buffer scale to infinity or NaN"),
    "they cost accuracy": ("0 * self.scale", "should not lower it on unseen classes"),
    "they are parameters": (
        "next(self.backbone.parameters()).data.add_(1).sum() * self.scale",
        "learn_statistics changed the parameter backbone.blocks.0.weight",
    ),
}


@pytest.mark.parametrize("how", [None, *BROKEN_STATISTICS])
def test_a_head_in_closed_form_is_held_to_what_its_statistics_are(
    how: str | None, installed: Callable[..., Path], tmp_path: Path
) -> None:
    statistics, words = BROKEN_STATISTICS[how] if how else ("2 * torch.ones_like(self.scale)", "")
    learns = LEARNS.replace("STATISTICS", statistics).lstrip()
    installed(("def fit", learns), (FIT, f"features = features * self.scale; {FIT}"),
              (LOGITS, f"features = features * self.scale; {LOGITS}"), source=HEAD)  # fmt: skip
    if how:
        assert words in failure(tmp_path, "learns_a_toy_problem").what
    else:
        [learns_check] = [each for each in testing.CHECKS if each.__name__ == "learns_a_toy_problem"]
        outcome = plugin_check.run(learns_check, plugin_check.subject("mine", [], tmp_path))
        assert (outcome.failure, outcome.exempt) == (None, None)


def test_a_head_that_cannot_be_batched_may_say_so(installed: Callable[..., Path], tmp_path: Path) -> None:
    """Steps by kshot.gradient run under vmap, so a FeatureLoop needs no such word."""
    [batch] = [each for each in testing.CHECKS if each.__name__.startswith("episodes_of_a_batch")]
    number = "features = features * features.mean().item(); "
    installed((FIT, number + FIT), ('name = "mine"', 'name = "mine"; batched = False'), source=HEAD)
    outcome = plugin_check.run(batch, plugin_check.subject("mine", [], tmp_path))
    assert (outcome.failure, outcome.exempt) == (None, "`batched = False`: its episodes run one by one")
    outcome = plugin_check.run(batch, plugin_check.subject("baselinepp", [], tmp_path))
    assert (outcome.failure, outcome.exempt) == (None, None)


RAISED = {
    "a shape": ("class_means(features, labels, classes) @ torch.eye(3)", "RuntimeError: mat1 and mat2 shapes", ""),
    "an assertion of its own": ("_never()", "AssertionError", ""),
    "an exit": ("exit(0)", "SystemExit: 0", ""),
    "a gradient by torch": (
        "torch.autograd.grad(features.sum(), list(self.parameters()))[0]",
        "RuntimeError: element 0 of tensors does not require grad",
        "kshot.gradient",
    ),
}


@pytest.mark.parametrize("what", RAISED)
def test_what_is_raised_is_told_with_the_innermost_line_of_the_authors_code(
    what: str, installed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expression, words, advice = RAISED[what]
    helper = "def _never():\n    assert 0\n"
    file = installed((RETURN, f'return {{"means": {expression}}}'), ("@hookimpl", f"{helper}@hookimpl"))
    monkeypatch.chdir(file.parent)
    found = failure(tmp_path, testing.CHECKS[0].__name__)
    assert found.what.startswith(words)
    assert advice in found.advice
    function, line = (
        ("_never", "assert 0") if "_never" in expression else ("adapt", f'return {{"means": {expression}}}')
    )
    number = [each.strip() for each in file.read_text().splitlines()].index(line) + 1
    assert found.where == f"{file.name}:{number}, in {function}: {line}"


def test_what_does_not_export_is_told_in_the_exporters_words(installed: Callable[..., Path], tmp_path: Path) -> None:
    means = "torch.stack([features[labels == classes[i]].mean(0) for i in range(len(classes))])"
    installed((RETURN, f'return {{"means": {means}}}'))
    found = failure(tmp_path, "onnx_agrees_with_torch")
    assert found.what.startswith("adapt of 'mine' works for one number of ways only")
    assert found.advice == ""


def test_a_report_of_failures_ends_with_status_1_and_tells_nothing_twice(
    installed: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed((RETURN, f"assert len(classes) == 5, 'five'; {RETURN}"))
    monkeypatch.setattr(testing, "CHECKS", QUICK)
    shown = kshot("check", "mine")
    assert shown.exit_code == 1
    assert shown.output.count("FAILED") == 2  # other ways, and the gradient on three ways
    assert shown.output.count("AssertionError: five") == 1
    assert shown.output.count("As above.") == 1
    assert "Traceback" not in shown.output
    assert f"mine breaks 2 of {len(QUICK)} promises." in shown.output


def test_a_learner_that_a_promise_is_not_about_is_exempt_and_told_why(tmp_path: Path) -> None:
    [gradient] = [each for each in testing.CHECKS if each.__name__.startswith("meta_gradient")]
    outcome = plugin_check.run(gradient, plugin_check.subject("reptile", [], tmp_path))
    assert outcome.failure is None
    assert "surrogate" in (outcome.exempt or "")
    outcome = plugin_check.run(gradient, plugin_check.subject("protonet", [], tmp_path))
    assert (outcome.failure, outcome.exempt) == (None, None)


def test_nothing_is_checked_on_a_learner_that_does_not_run_at_all(installed: Callable[..., Path]) -> None:
    installed(("def classify", "def clasify"))
    shown = kshot("check", "mine")
    assert shown.exit_code == 1
    assert "abstract method classify" in shown.output.replace("'", "")
    assert shown.output.count("FAILED") == 1
    assert f"the other {len(testing.CHECKS) - 1} promises build on it" in shown.output


def test_settings_are_given_to_the_learner_and_judged_by_its_config(
    installed: Callable[..., Path], tmp_path: Path
) -> None:
    installed((LOGITS, f"assert self.config.power == 2, 'odd'; {LOGITS}"))
    subject = plugin_check.subject("mine", ["power=3", "norm=group"], tmp_path)
    assert (subject.options, subject.norm, subject.norms) == ({"power": 3}, "group", ("group",))
    assert subject.build().backbone.norm == "group"
    found = plugin_check.run(testing.CHECKS[0], subject).failure
    assert found
    assert found.what == "AssertionError: odd"
    for setting, words in {
        "powr=3": "unknown key 'powr'; did you mean 'power'?",
        "power=x": "power = 'x'",
        "power": "key=value",
        "name=protonet": "no setting of a learner",
        "norm=grop": "norm = 'grop'",
    }.items():
        with pytest.raises(KshotError, match=re.escape(words)):
            plugin_check.subject("mine", [setting], tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("class Mine(Learner)", "class Mine", "it must be a subclass of kshot.Learner"),
        ("class Config(LearnerConfig)", "class Config", "must derive from kshot.LearnerConfig"),
    ],
)
def test_what_has_the_wrong_parent_is_told_so_before_anything_is_checked(
    old: str, new: str, words: str, installed: Callable[..., Path], tmp_path: Path
) -> None:
    installed((old, new))
    with pytest.raises(KshotError, match=words):
        plugin_check.subject("mine", [], tmp_path)


def test_a_misspelt_name_is_answered_with_a_guess(tmp_path: Path) -> None:
    with pytest.raises(KshotError, match=r"did you mean 'protonet'\?"):
        plugin_check.subject("protnet", [], tmp_path)


def test_a_plugin_that_does_not_load_is_told_with_its_reason_and_line(
    installed: Callable[..., Path], tmp_path: Path
) -> None:
    file = installed(("import torch\n", "import torch, no_such_module\n"))
    with pytest.raises(
        KshotError, match=r"plugin 'mine' .* does not load: ModuleNotFoundError: No module named 'no_s"
    ) as told:
        plugin_check.subject("mine", [], tmp_path)
    assert f"{file.name}:2, in <module>: import torch, no_such_module" in str(told.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("conv4", "is a backbone, and the kit is for learners.*kshot run "),
        ("glyphs", "is a source of data.*import glyphs glyphs"),
    ],
)
def test_what_is_no_learner_is_told_what_to_try_instead(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(KshotError, match=words):
        plugin_check.subject(name, [], tmp_path)
