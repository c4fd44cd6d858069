"""Finding plugins: the broken are shown as broken, the rest works, and two of one name are named both."""

import ast
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import kshot
import kshot_plugins
from kshot import plugins
from kshot_runtime.errors import KshotError


def load(tmp_path, monkeypatch, **sources: str) -> plugins.Found:
    monkeypatch.syspath_prepend(tmp_path)
    points = []
    for name, source in sources.items():
        module = f"{name}_of_{tmp_path.name}"
        (tmp_path / f"{module}.py").write_text(source)
        points.append(EntryPoint(name, module, "kshot"))
    return plugins.load(points)


LEARNER = """
from kshot import Learner, hookimpl
class Mine(Learner):
    name = "mine"
    def adapt(self, support, labels, classes): return {}
    def classify(self, state, query): return query
@hookimpl
def kshot_learners(): return [Mine]
"""


def test_installed_plugins_come_with_their_distribution_and_version():
    found = plugins.find()
    assert {"finetune", "maml", "protonet"} <= {p.name for p in found.of("learners")}
    assert {"conv4", "resnet12", "torchvision"} <= {p.name for p in found.of("backbones")}
    assert found.learner("maml").distribution == "kshot"
    assert found.broken == []


def test_a_broken_plugin_is_listed_and_the_rest_works(tmp_path, monkeypatch):
    found = load(tmp_path, monkeypatch, one="import no_such_module", two=LEARNER, three="raise SystemExit(3)")
    assert {b.plugin: b.reason for b in found.broken} == {
        "one": "ModuleNotFoundError: No module named 'no_such_module'",
        "three": "SystemExit: 3",
    }
    assert found.learner("mine").plugin == "two"


def test_a_broken_plugin_is_listed_with_the_line_of_its_own_code(tmp_path, monkeypatch):
    raised = "def kshot_learners(): return helper()\ndef helper(): return int('x')"
    found = load(
        tmp_path, monkeypatch, one="\nimport no_such_module", two=f"from kshot import hookimpl\n@hookimpl\n{raised}"
    )
    one, two = found.broken
    assert one.where.endswith(f"one_of_{tmp_path.name}.py:2, in <module>: import no_such_module")
    assert two.where.endswith(f"two_of_{tmp_path.name}.py:4, in helper: def helper(): return int('x')")


def test_two_plugins_with_one_name_are_an_error_that_names_both(tmp_path, monkeypatch):
    found = load(tmp_path, monkeypatch, one=LEARNER, two=LEARNER)
    with pytest.raises(KshotError, match=r"'mine' from plugin 'one'.* and 'mine' from plugin 'two'"):
        found.learner("mine")


def test_a_misspelt_hook_is_an_error_and_not_silence(tmp_path, monkeypatch):
    found = load(tmp_path, monkeypatch, one=LEARNER.replace("kshot_learners", "kshot_lerners"))
    assert "kshot_lerners" in found.broken[0].reason


def test_a_plugin_that_provides_nothing_is_broken(tmp_path, monkeypatch):
    assert "provides nothing" in load(tmp_path, monkeypatch, one="x = 1").broken[0].reason


def test_an_unknown_name_gets_a_suggestion_and_the_list():
    with pytest.raises(
        KshotError, match=r"no algorithm named 'protnet'; did you mean 'protonet'\? \(installed: .*maml"
    ):
        plugins.find().learner("protnet")


def test_the_vocabulary_of_a_plugins_author_is_there():
    assert sorted(kshot.__all__) == list(dict.fromkeys(sorted(kshot.__all__)))
    assert all(hasattr(kshot, name) for name in kshot.__all__)


@pytest.mark.parametrize("file", sorted(Path(kshot_plugins.__file__).parent.glob("*.py")), ids=lambda file: file.stem)
def test_our_plugins_import_nothing_of_kshot_but_what_any_author_has(file: Path):
    """So that whatever ours can do, anyone's can: `from kshot import ...` of names in kshot.__all__, and no more."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert not [alias.name for alias in node.names if alias.name.split(".")[0].startswith("kshot")]
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0].startswith("kshot"):
            where = f"line {node.lineno}: from {node.module} import"
            assert node.module == "kshot" or str(node.module).startswith("kshot_plugins."), where
            if node.module == "kshot":
                beyond = {alias.name for alias in node.names} - set(kshot.__all__)
                assert not beyond, f"{where} {beyond}"
