"""docs/errors.md: every example is what the command says, and every kind of mistake has its place."""

import re
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[3] / "docs/errors.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^\$ keepdrop (.*)\nkeepdrop: (.*)$", PAGE, re.MULTILINE)
ANCHORS = [
    *("command-line", "settings", "data", "metric", "network", "checkpoint", "base-accuracy", "drop-bound", "layers"),
    *("agents", "run-folder", "pruned-file", "disk"),
]


def test_every_kind_has_its_anchor():
    assert [title.lower().replace(" ", "-") for title in re.findall(r"^## (.*)$", PAGE, re.MULTILINE)] == ANCHORS
    assert PAGE.count("\n$ ") == len(EXAMPLES) >= 20


@pytest.mark.parametrize(("arguments", "sentence"), EXAMPLES)
def test_examples_are_true(refused, tmp_path, arguments, sentence):
    (tmp_path / "broken.pt").write_text("not weights\n")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("something\n")
    assert refused(*arguments.split()) == sentence
