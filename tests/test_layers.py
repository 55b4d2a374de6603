"""What may import what. The packages are read, not run, so a forbidden import inside a function is found as well."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rewards", "envs", "agent", "experiments")
ALLOWED = {
    "rewards": {"rewards"},
    "envs": {"envs", "rewards"},
    "agent": {"agent"},
    "experiments": {"experiments", "agent", "envs", "rewards"},
}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).glob("**/*.py"))]


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, ours as keepdrop.PACKAGE.MODULE."""
    here = ["keepdrop", *path.relative_to(ROOT).with_suffix("").parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            whole = ".".join(part for part in (base, node.module) if part)
            found |= {whole} | {f"{whole}.{alias.name}" for alias in node.names}
    return found


def ours(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("keepdrop.")} & set(PACKAGES)


def outside(names: set[str]) -> set[str]:
    tops = {name.split(".")[0] for name in names} - {"keepdrop"}
    return tops - set(sys.stdlib_module_names)


def test_the_files_are_found():
    assert len(FILES) > 50


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_one_way(package):
    for path in sorted((ROOT / package).glob("**/*.py")):
        assert ours(imported(path)) <= ALLOWED[package], path


def test_rewards_need_the_standard_library_alone():
    for path in (ROOT / "rewards").glob("*.py"):
        assert outside(imported(path)) == set(), path


def test_the_agent_sees_spaces_and_arrays_only():
    for path in (ROOT / "agent").glob("*.py"):
        assert outside(imported(path)) <= {"gymnasium", "torch", "numpy", "safetensors"}, path


@pytest.mark.parametrize("package", ["rewards", "envs", "agent"])
def test_configuration_stays_in_experiments(package):
    for path in (ROOT / package).glob("*.py"):
        assert not outside(imported(path)) & {"hydra", "omegaconf", "rich", "tensorboard"}, path


def test_torch_pruning_is_a_peer_and_nothing_else():
    assert [path.name for path in FILES if "torch_pruning" in outside(imported(path))] == ["compare_peer.py"]


def test_no_import_goes_round():
    modules = {".".join(("keepdrop", *path.relative_to(ROOT).with_suffix("").parts)): path for path in FILES}
    graph = {name: imported(path) & modules.keys() - {name} for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import circle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for next_name in sorted(graph[name]):
                visit(next_name, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done == modules.keys()


def test_files_stay_short():
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 300} == {}
