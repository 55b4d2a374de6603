"""docs/architecture.md is what the code is; names of the package are today's wherever the docs use them."""

import ast
import importlib.util
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
RENEW = "run `python benchmarks/structure.py --write docs/architecture.md`"
# Where names of the package stand that a reader may copy. The changelog names old ones on purpose.
WRITTEN = [
    *(ROOT / "docs").rglob("*.md"),
    *(ROOT / "examples").glob("*.py"),
    *(ROOT / "conf").rglob("*.yaml"),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
]


@pytest.fixture(scope="module")
def structure():
    spec = importlib.util.spec_from_file_location("structure_script", ROOT / "benchmarks" / "structure.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tree_says_what_the_rooms_say(structure):
    tree = re.search(r"<!-- tree -->\n(.*?)\n<!-- end of tree -->", PAGE, re.DOTALL)[1]
    assert tree == structure.annotated_tree(), RENEW
    said = " ".join(tree.split())
    for room in structure.rooms():
        source = (ROOT / room.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
        sentence = " ".join(ast.get_docstring(ast.parse(source)).split("\n\n")[0].split())
        assert f"{room.rpartition('.')[2]}/ {sentence}" in said


def test_the_order_is_the_one_that_is_tested(structure):
    order = re.search(r"<!-- order -->\n```text\n(.*?)\n```\n<!-- end of order -->", PAGE, re.DOTALL)[1]
    assert order.replace("\n", " ").split(" < ") == structure.rooms(), RENEW


def test_no_folder_is_flat(structure):
    counts = {room: len(structure.files_in(room)) for room in structure.rooms()}
    assert sum(counts.values()) + len(structure.files_in("experiments")) == len(structure.files())
    assert max(counts.values()) <= structure.MOST_FILES


def test_every_setting_is_read(structure):
    assert len(structure.settings()) > 100
    assert structure.unread_settings() == {}
    assert structure.unread_settings({"nobody_reads_this": "conf/prune.yaml"}) == {
        "nobody_reads_this": "conf/prune.yaml"
    }


def test_every_path_on_the_page_exists():
    pages = PAGE + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(
        r"`((?:agent|benchmarks|conf|docs|envs|examples|experiments|keepdrop|rewards|tests)/[^` ]*)`", pages
    )
    assert len(paths) > 40
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []


@cache
def defined(path: Path) -> set[str]:
    """Names at the top of a module, those it imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
    return found


def exists(dotted: str) -> bool:
    """Whether `keepdrop.a.b.name` is a room, a module, or a name in one (or of the class it names)."""
    parts = dotted.split(".")[1:]
    where = ROOT
    while parts and (where / parts[0]).is_dir():
        where /= parts.pop(0)
    if where == ROOT:
        where = ROOT / "keepdrop"
    if not parts:
        return True
    file = where / f"{parts[0]}.py"
    if not file.is_file():
        return (where / "__init__.py").is_file() and parts[0] in defined(where / "__init__.py")
    return len(parts) == 1 or parts[1] in defined(file)


def test_the_search_for_names_finds_old_ones():
    assert exists("keepdrop.envs.data.splits.split") and exists("keepdrop.prune") and exists("keepdrop.agent")
    assert not exists("keepdrop.envs.judge") and not exists("keepdrop.envs.data.objective.Measure")


@pytest.mark.parametrize("page", WRITTEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_the_package_are_todays(page):
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w/.-])keepdrop(?:\.[A-Za-z_]\w*)+", text))
    assert sorted(name for name in named if not exists(name)) == []
    for module, names in re.findall(r"^from (keepdrop[\w.]*) import ([\w, ]+)$", text, re.MULTILINE):
        assert [name for name in names.split(",") if not exists(f"{module}.{name.strip()}")] == []


def test_no_file_is_named_twice(structure):
    assert structure.named_twice() == {}
