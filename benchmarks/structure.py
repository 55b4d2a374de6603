"""Structure of the code: the tree of rooms, files per folder, function lengths, lone importers, unread settings.

Reads the sources with `ast` and imports nothing of keepdrop. Prints the generated parts of `docs/architecture.md`;
`--write` puts them there:

    python benchmarks/structure.py
    python benchmarks/structure.py --write docs/architecture.md
"""

from __future__ import annotations

import argparse
import ast
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("keepdrop", "rewards", "agent", "envs", "experiments")
MOST_FILES = 20
WIDTH = 118
OF_HYDRA = {"defaults", "hydra", "_target_", "_partial_"}


def files() -> list[Path]:
    """Every Python file of the package."""
    return [path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))]


@cache
def tree_of(path: Path) -> ast.Module:
    """The parsed source of a file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def name_of(path: Path) -> str:
    """`envs.data.splits` for envs/data/splits.py, `envs.data` for its `__init__.py`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def rooms() -> list[str]:
    """The folders with an `__init__.py`, in the order of imports, as `tests/test_layers.py` holds it."""
    for node in tree_of(ROOT / "tests" / "test_layers.py").body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ROOMS":
            return list(ast.literal_eval(node.value))
    raise SystemExit("tests/test_layers.py has no ROOMS")


def files_in(room: str) -> list[Path]:
    """The Python files that stand in a room itself, not in a room inside it."""
    return sorted((ROOT / room.replace(".", "/")).glob("*.py"))


def sentence(folder: Path) -> str:
    """What a folder is for: the first paragraph of its `__init__.py`."""
    text = ast.get_docstring(tree_of(folder / "__init__.py")) or ""
    return " ".join(text.split("\n\n")[0].split())


def annotated_tree() -> str:
    """Every room with its sentence, rooms inside a package indented below it."""
    inner = {top: [room for room in rooms() if room.startswith(f"{top}.")] for top in TOPS}
    lines = []
    for room in [each for top in TOPS for each in (top, *inner[top])] + ["conf"]:
        label = f"{'  ' * room.count('.')}{room.rpartition('.')[2]}/"
        text = sentence(ROOT / room.replace(".", "/"))
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"{label:<16}", subsequent_indent=" " * 16)
    return "\n".join(["```text", *lines, "```"])


def import_order() -> str:
    """The rooms from the ground up."""
    text = " < ".join(rooms())
    return "\n".join(["```text", *textwrap.wrap(text, WIDTH, break_on_hyphens=False), "```"])


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Name and lines of every function and method of a file, docstrings included."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, wherever in it the import stands."""
    here = ["keepdrop", *path.relative_to(ROOT).with_suffix("").parts]
    here = here[1:] if here[1] == "keepdrop" else here
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) if node.level else ""
            whole = ".".join(part for part in (base, node.module) if part)
            found |= {whole} | {f"{whole}.{alias.name}" for alias in node.names}
    named = {name_of(each): each for each in files()}
    return {name for name in named if name in found or f"keepdrop.{name}" in found} - {name_of(path)}


def importers() -> dict[str, set[str]]:
    """Module -> the modules that import it."""
    found: dict[str, set[str]] = defaultdict(set)
    for path in files():
        for name in imports(path):
            found[name].add(name_of(path))
    return found


def lone_importers() -> dict[str, str]:
    """Modules that exactly one other module imports -> that one."""
    known = importers()
    modules = [name_of(path) for path in files() if path.name != "__init__.py"]
    return {name: next(iter(known[name])) for name in modules if len(known[name]) == 1}


def named_twice() -> dict[str, list[str]]:
    """File names that stand in more than one room -> where."""
    found = defaultdict(list)
    for path in files():
        if path.name != "__init__.py":
            found[path.name].append(name_of(path.parent))
    return {name: places for name, places in sorted(found.items()) if len(places) > 1}


def settings() -> dict[str, str]:
    """Every setting -> where it stands: the keys of conf/, and the fields of the schema and of the classes in it.

    Presets of Hydra's own plugins (conf/hydra) are read by those.
    """
    found: dict[str, str] = {}
    for path in sorted(set((ROOT / "conf").rglob("*.yaml")) - set((ROOT / "conf" / "hydra").rglob("*.yaml"))):
        for key in _keys(yaml.safe_load(path.read_text(encoding="utf-8")) or {}):
            found.setdefault(key, str(path.relative_to(ROOT)))
    classes = {
        node.name: (node, path) for path in files() for node in tree_of(path).body if isinstance(node, ast.ClassDef)
    }
    schema = (ROOT / "experiments" / "config").glob("schema*.py")
    wanted = {node.name for path in schema for node in tree_of(path).body if isinstance(node, ast.ClassDef)}
    seen: set[str] = set()
    while wanted - seen:
        node, path = classes[(wanted - seen).pop()]
        seen.add(node.name)
        for each in node.body:
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                found.setdefault(each.target.id, str(path.relative_to(ROOT)))
                named = {inner.id for inner in ast.walk(each.annotation) if isinstance(inner, ast.Name)}
                wanted |= named & classes.keys()
    return found


def unread_settings(more: dict[str, str] | None = None) -> dict[str, str]:
    """Settings whose name no code uses: no attribute, no item or dotted key, no argument that is read.

    Names alone are compared, so a setting that shares its name with one that is read counts as read.
    """
    read = set().union(*(_read_names(path) for path in files()))
    return {key: place for key, place in {**settings(), **(more or {})}.items() if key not in read}


def _keys(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key not in OF_HYDRA and "/" not in str(key) and not str(key).startswith("override"):
                yield str(key)
                yield from _keys(value)


def _read_names(path: Path) -> set[str]:
    """Names that a file reads; what a `__post_init__` checks is not read yet."""
    found: set[str] = set()
    checks = {
        inner
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree_of(path)):
        if node in checks:
            continue
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add(node.attr)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"[\w.]+", node.value):
            found |= set(node.value.split("."))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = {each.arg for each in (*node.args.args, *node.args.kwonlyargs)}
            used = {each.id for each in ast.walk(node) if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Load)}
            found |= arguments & used
    return found


def table() -> str:
    """Files, function lengths and modules with one importer, room by room, and what is found in no room's favour."""
    lone = lone_importers()
    rows = [
        "| room | files | lines | functions | mean lines | longest | one importer |",
        "|---|--:|--:|--:|--:|---|--:|",
    ]
    for room in rooms():
        paths = files_in(room)
        lengths = [(count, f"{path.stem}.{name}") for path in paths for name, count in functions(path)]
        lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)
        mean = sum(count for count, _ in lengths) / len(lengths) if lengths else 0
        longest = f"{max(lengths)[0]}, `{max(lengths)[1]}`" if lengths else "-"
        alone = sum(name.rpartition(".")[0] == room for name in lone)
        rows.append(f"| `{room}` | {len(paths)} | {lines} | {len(lengths)} | {mean:.1f} | {longest} | {alone} |")
    every = [count for path in files() for _, count in functions(path)]
    largest = max(len(files_in(room)) for room in rooms())
    return "\n".join(
        [
            *rows,
            "",
            f"- {len(files())} files; the largest folder holds {largest} (at most {MOST_FILES}).",
            f"- {len(every)} functions of {sum(every) / len(every):.1f} lines on average.",
            f"- Settings nobody reads: {_counted(unread_settings())}.",
            f"- Files named twice: {_counted(named_twice())}.",
            f"- Modules with one importer: {len(lone)}.",
        ]
    )


def _counted(found: dict[str, Any]) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(found))
    return f"{len(found)} ({names})" if found else "0"


PARTS = {"tree": annotated_tree, "order": import_order, "table": table}


def written(page: str) -> str:
    """The page with its generated parts, which stand between `<!-- NAME -->` and `<!-- end of NAME -->`."""
    for name, part in PARTS.items():
        pattern = rf"(<!-- {name} -->\n)(.*?)(<!-- end of {name} -->)"
        page, count = re.subn(
            pattern, lambda match, part=part: f"{match[1]}{part()}\n{match[3]}", page, flags=re.DOTALL
        )  # type: ignore[misc]
        if count != 1:
            raise SystemExit(f"the page has {count} places for {name!r}; expected 1")
    return page


def main() -> None:
    """Print the parts, or write them into a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--write", type=Path, help="page whose generated parts are replaced")
    parser.add_argument("--lone", action="store_true", help="list the modules with one importer")
    options = parser.parse_args()
    if options.write:
        options.write.write_text(written(options.write.read_text(encoding="utf-8")), encoding="utf-8")
    elif options.lone:
        print(*(f"{name} <- {user}" for name, user in lone_importers().items()), sep="\n")
    else:
        print(*(part() for part in PARTS.values()), sep="\n\n")


if __name__ == "__main__":
    main()
