"""What may import what. The packages are read, not run, so a forbidden import inside a function is found as well."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rewards", "agent", "envs", "experiments")
# Rooms from the ground up: each imports only what stands above it in this list, and `ALLOWED` packages alone.
ROOMS = (
    "keepdrop",
    "rewards",
    "agent.policies",
    "agent.learning",
    "agent",
    "envs.data",
    "envs.networks",
    "envs.surgery",
    "envs.groups",
    "envs.evaluation",
    "envs.repair",
    "envs.files",
    "envs",
    "experiments.runs",
    "experiments.engines",
    "experiments.training",
    "experiments.deploy",
    "experiments.pruning",
    "experiments.api",
    "experiments.config",
    "experiments.pretraining",
    "experiments.oracle",
    "experiments.compare",
    "experiments.iterate",
    "experiments.reporting",
    "experiments.commands",
)
ALLOWED = {
    "keepdrop": {"keepdrop"},
    "rewards": {"keepdrop", "rewards"},
    "agent": {"keepdrop", "agent"},
    "envs": {"keepdrop", "envs", "rewards"},
    "experiments": {"keepdrop", "experiments", "agent", "envs", "rewards"},
}
MOST_FILES = 20


def name_of(path: Path) -> str:
    """`envs.data.splits` for envs/data/splits.py, and likewise for keepdrop/errors.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


GROUND = [path for path in sorted((ROOT / "keepdrop").glob("*.py")) if path.name != "__init__.py"]
FILES = [*GROUND, *(path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))]
MODULES = {name_of(path): path for path in FILES}


def room_of(module: str) -> str:
    """The folder a module stands in; of a package's `__init__` the package."""
    return module.rpartition(".")[0]


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports; ours without the leading `keepdrop.`."""
    parts = name_of(path).split(".")
    here = parts if parts[0] == "keepdrop" else ["keepdrop", *parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            whole = ".".join(part for part in (base, node.module) if part)
            found |= {whole} | {f"{whole}.{alias.name}" for alias in node.names}
    return found


def ours(path: Path) -> set[str]:
    """Our modules that a file imports, as `envs.data.splits`; those of the ground floor as `keepdrop.errors`."""
    names = imported(path)
    return {name for name in MODULES if name in names or f"keepdrop.{name}" in names}


def outside(path: Path) -> set[str]:
    tops = {name.split(".")[0] for name in imported(path)} - {"keepdrop"}
    return tops - set(sys.stdlib_module_names)


def test_the_files_are_found():
    assert len(FILES) > 100 and {room_of(name) for name in MODULES} == {*ROOMS, "experiments"}


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_one_way(room):
    below = ROOMS[: ROOMS.index(room) + 1]
    for name, path in MODULES.items():
        if room_of(name) == room:
            rooms = {room_of(each) for each in ours(path)}
            assert rooms <= set(below), (name, rooms - set(below))
            assert {each.split(".")[0] for each in rooms} <= ALLOWED[room.split(".")[0]], name


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_no_halls(room):
    """No folder holds more files than a reader takes in at once, and each says in a sentence what it is for."""
    folder = ROOT / room.replace(".", "/")
    assert len(list(folder.glob("*.py"))) <= MOST_FILES
    sentence = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    assert sentence


@pytest.mark.parametrize("room", [room for room in ROOMS if "." in room])
def test_rooms_are_installed(room):
    """pyproject.toml lists packages one by one, so a new room is easily left out of the wheel."""
    assert f'"keepdrop.{room}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_tests_mirror_the_rooms():
    folders = {
        ".".join(path.parent.relative_to(ROOT / "tests").parts) for path in (ROOT / "tests").rglob("*/test_*.py")
    }
    assert folders - {"docs", "examples"} <= set(ROOMS)


def test_the_ground_floor_and_rewards_need_the_standard_library_alone():
    """But for files elsewhere, which are reached through the package that torch brings for its own."""
    for path in [*GROUND, *(ROOT / "rewards").rglob("*.py")]:
        assert outside(path) == ({"fsspec"} if path.name == "remote.py" else set()), path


def test_the_agent_sees_spaces_and_arrays_only():
    for path in (ROOT / "agent").rglob("*.py"):
        assert outside(path) <= {"gymnasium", "torch", "numpy", "safetensors"}, path


@pytest.mark.parametrize("package", ["rewards", "envs", "agent"])
def test_configuration_stays_in_experiments(package):
    for path in (ROOT / package).rglob("*.py"):
        assert not outside(path) & {"hydra", "omegaconf", "rich", "tensorboard"}, path


def test_python_interface_needs_no_hydra():
    for room in ("api", "pruning", "training", "deploy"):
        for path in (ROOT / "experiments" / room).rglob("*.py"):
            assert not outside(path) & {"hydra", "omegaconf"}, path


def test_torch_pruning_is_a_peer_and_nothing_else():
    assert [name_of(path) for path in FILES if "torch_pruning" in outside(path)] == [
        "experiments.compare.torch_pruning"
    ]


def test_no_import_goes_round():
    graph = {name: ours(path) - {name} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import circle: {' -> '.join((*trail[trail.index(name) :], name))}"
        if name not in done:
            for next_name in sorted(graph[name]):
                visit(next_name, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())
    assert done == MODULES.keys()
