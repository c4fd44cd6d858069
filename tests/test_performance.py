"""docs/performance.md says what bench/results/speed.json says, and that holds the rows that are to be shown."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[1]


def page() -> ModuleType:
    """bench/performance_page.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("performance_page", ROOT / "bench" / "performance_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_page_say_what_the_results_say():
    text = (ROOT / "docs" / "performance.md").read_text()
    found = json.loads((ROOT / "bench" / "results" / "speed.json").read_text())
    assert page().rewritten(text, found) == text, "run: python bench/performance_page.py"
    assert all(row["what"] in text for row in (*found["rows"], *found["causes"]))


def test_each_row_of_the_results_is_one_to_be_shown_with_its_bar():
    rows = json.loads((ROOT / "bench" / "results" / "speed.json").read_text())["rows"]
    assert {row["what"]: row["bar"] for row in rows} == {
        "ProtoNet step, 60-way 1-shot": 1.35,
        "ProtoNet step, 5-way 5-shot": 1.35,
        "ProtoNet step, 84x84x3, 10-way 5-shot": 1.4,
        "ProtoNet step, 60-way 1-shot, as they come": 2.4,
        "ProtoNet step, 5-way 5-shot, as they come": 1.8,
        "ProtoNet step, 84x84x3, 10-way 5-shot, as they come": 2.6,
        "MAML step, second order": 1.25,
        "MAML step, first order": 1.25,
        "MAML peak memory, 16 episodes": 1.2,
        "MAML evaluation, 10 steps": 1.3,
        "10,000 ProtoNet test episodes": 35,
        "Bundle: MAML adapts to 25 photos, 5 steps": 1.0,
        "Bundle: MAML classifies 75 photos": 1.5,
        "Bundle: MAML classifies 1 photo": 2,
        "`make run`, the second time": 2.5,
    }
