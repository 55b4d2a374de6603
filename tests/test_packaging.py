"""What a user installs: the wheel's files, and the command in an environment that knows nothing of this folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("agent", "conf", "envs", "experiments", "rewards")
TOP = "keepdrop"  # the package itself: the public names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel; built from a copy, because setuptools keeps old files in build/."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = [*PACKAGES, TOP, "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(source)], check=True)
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(target)], cwd=source, check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def content(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_fits_every_machine(wheel):
    assert wheel.name.startswith("keepdrop-") and wheel.name.endswith("-py3-none-any.whl")


def test_nothing_lands_outside_the_package(content):
    tops = {name.split("/")[0] for name in content}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"keepdrop"} and len(tops) == 2


def test_wheel_holds_every_file_of_the_packages(content):
    """Modules, configuration and data: the digits with their license, templates of pages."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    expected = {f"keepdrop/{path.relative_to(ROOT)}" for path in files if path.parent.name != "__pycache__"}
    expected |= {f"keepdrop/{path.name}" for path in (ROOT / TOP).iterdir() if path.is_file()}
    assert {name for name in content if ".dist-info/" not in name} == expected
    assert {"keepdrop/conf/prune.yaml", "keepdrop/envs/data/digits.txt"} < expected


def test_wheel_is_typed_and_licensed(content):
    typed = {f"keepdrop/{package}/py.typed" for package in PACKAGES if package != "conf"} | {"keepdrop/py.typed"}
    assert typed <= content
    assert any(name.endswith("licenses/LICENSE") for name in content)
    assert {name for name in content if "/tests/" in name or "__pycache__" in name} == set()


def test_entry_points(wheel, content):
    (name,) = [name for name in content if name.endswith("entry_points.txt")]
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(name).decode()
    assert "keepdrop = keepdrop.experiments.commands.cli:main" in text


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A new environment with the wheel alone; dependencies come from this one, whose own keepdrop is hidden."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    dependencies = tmp_path_factory.mktemp("dependencies")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "keepdrop" not in entry.name:
            (dependencies / entry.name).symlink_to(entry)
    # Links under another path: .pth files, among them the one of the editable install, only work in site-packages.
    (site / "dependencies.pth").write_text(f"{dependencies}\n")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--python",
        str(folder / "bin/python"),
        "install",
    ]
    command = [*pip, "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return folder / "bin"


def run(installed, *arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        [str(installed / arguments[0]), *arguments[1:]],
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_installed_command_helps_and_prunes(installed, tmp_path):
    where = run(installed, "python", "-c", "import keepdrop.agent as a; print(a.__file__)", cwd=tmp_path)
    assert str(installed.parent) in where.stdout, where.stderr
    helped = run(installed, "keepdrop", "--help", cwd=tmp_path)
    assert helped.returncode == 0 and "train-agent" in helped.stdout
    tiny = ["base.epochs=1", "base.lr=0.05", "layers=[conv1]", "agent.updates=1", "search.masks=4", "drop_bound=0.4"]
    tiny += ["recovery.train.epochs=0", "finetune.epochs=0", "latency.repeats=1", "run_dir=run"]
    pruned = run(installed, "keepdrop", "prune", *tiny, cwd=tmp_path)
    assert pruned.returncode == 0, pruned.stderr
    assert "Run folder: run" in pruned.stdout and (tmp_path / "run/pruned/model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_environment_is_found_by_its_id(installed, tmp_path):
    """With the module in front of the id, as Gymnasium 1 wants it: nothing of keepdrop is imported before."""
    name = "keepdrop.envs.registration:keepdrop/FilterPruning-v0"
    made = run(installed, "python", "-c", f"import gymnasium; gymnasium.make({name!r})", cwd=tmp_path)
    assert "keepdrop/FilterPruning-v0 was made without model, splits, reward" in made.stderr
