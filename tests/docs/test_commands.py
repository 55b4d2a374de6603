"""Every command line in the docs composes, and none of its settings would do nothing."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from keepdrop.errors import UserError
from keepdrop.experiments.config import entry_point, ignored
from keepdrop.experiments.config.cli_errors import groups
from keepdrop.experiments.config.schema import register_schemas
from keepdrop.experiments.config.stored import inherit

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# errors.md shows commands that fail, and test_errors_page.py runs them; sweeps are run by test_guides.py.
SKIPPED = ("errors.md", "sweeps.md")
COMMANDS = ("prune", "train-cnn", "train-agent", "apply", "pretrain", "compare", "iterate", "oracle", "inspect")


def commands():
    """Every command line in the fenced blocks and code spans of the pages."""
    for page in PAGES:
        if page.name in SKIPPED:
            continue
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        spans = re.findall(r"`(keepdrop [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
        lines = [line for block in fenced for line in block.splitlines() if line.startswith("keepdrop ")]
        for line in [*lines, *spans]:
            words = shlex.split(line, comments=True)
            if words[1] in COMMANDS:
                yield pytest.param(words[1:], id=f"{page.name}: {' '.join(words[1:])}")


def check(command, *settings):
    """Compose a command line and refuse what would do nothing."""
    given = [each for each in settings if not each.startswith("-")]
    parsed = [OverridesParser.create().parse_override(each) for each in given]
    typed = dict(pair for each in parsed for pair in entry_point._dotted(each.key_or_group, each.value()))
    nulled = {f"{name}=null": f"~{name}" for name in groups()}
    register_schemas()
    if command == "apply":
        inherit(ROOT / "tests" / "fixtures" / "v0_1_0" / "layers")
    with initialize_config_module("keepdrop.conf", version_base="1.3"), pytest.MonkeyPatch.context() as patch:
        config = compose(command.replace("-", "_"), [nulled.get(each, each) for each in given])
        module = importlib.import_module(f"keepdrop.experiments.commands.{command.replace('-', '_')}")
        patch.setattr(ignored, "typed", lambda: typed)
        ignored.refuse_ignored(config, module.IGNORED if hasattr(module, "IGNORED") else ())


def test_commands_are_found():
    assert len(list(commands())) > 30


def test_a_setting_that_does_nothing_is_found():
    with pytest.raises(UserError, match="would do nothing"):
        check("prune", "target.removed=0.3", "agent.updates=3")


@pytest.mark.parametrize("words", list(commands()))
def test_command_composes_and_ignores_nothing(words):
    check(*words)
