"""The page of all options holds every key of every command and every option of every group, each with a meaning."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra 'docs')")
from keepdrop.experiments.config.cli_errors import groups, known_keys
from keepdrop.experiments.config.schema import ROOTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(hooks):
    return hooks.options_page()


@pytest.mark.parametrize("root", ROOTS)
def test_every_key_of_a_command_is_there(root, page):
    section = page.split(f"## keepdrop {root.replace('_', '-')}\n")[1].split("\n## ")[0]
    shown = set(re.findall(r"^\| \[?`([^`]+)`", section, re.MULTILINE))
    keys = set(known_keys(root))
    inner = {key for key in keys if any(other.startswith(f"{key}.") for other in keys)}
    wanted = {key for key in keys - inner if key.split(".")[0] not in groups()}
    assert wanted <= shown, sorted(wanted - shown)
    assert {key for key in keys if key in groups()} <= shown


def test_every_option_of_every_group_is_there(page):
    for group, options in groups().items():
        for option in options:
            assert f"### {group}={option}\n" in page


def test_every_setting_has_a_meaning(page):
    assert [line for line in page.splitlines() if re.match(r"\| `.*\|\s*\|$", line)] == []


def test_where_a_meaning_comes_from(hooks):
    text = "order: up   # low to high\nbase:\n  lr: 0.1\n  epochs: 2  # passes\nhydra:\n      seed=0     of chance\n"
    assert hooks.yaml_comments(text) == {"order": "low to high", "base.epochs": "passes", "seed": "of chance"}
    doc = "One.\n\n    Args:\n        one, two: both\n            of them.\n        three: alone.\n    "
    assert hooks.docstring_entries(doc) == {"one": "both of them.", "two": "both of them.", "three": "alone."}
    assert [hooks._shown(each) for each in (1, True, None, "a|b")] == ["1", "true", "null", "a\\|b"]
