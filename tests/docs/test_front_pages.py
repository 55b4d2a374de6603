"""README.md and docs/index.md name every command, and the README's environment runs as it stands."""

import re
from pathlib import Path

import pytest
from keepdrop.experiments.commands.cli import COMMANDS

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_every_command_is_listed(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `keepdrop ([\w-]+)", text, re.MULTILINE)) == sorted(COMMANDS)


def test_environment_of_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (snippet,) = [each for each in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "gymnasium.make" in each]
    names = {}
    exec(snippet, names)
    assert names["env"].action_space.n == 16 and names["terminated"] is True
    assert names["info"]["accuracy"] + names["info"]["accuracy_drop"] > 0.5
