"""What mkdocs generates while it builds: the page of all configuration options.

Every key comes from the composed configuration, its meaning from the comment in the YAML, the command's help, or the
docstring of the settings class that holds it: nothing is written twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from importlib import resources
from inspect import cleandoc
from typing import Any, get_type_hints

from hydra import compose, initialize_config_module
from hydra.utils import get_object
from keepdrop.experiments.config.cli_errors import groups
from keepdrop.experiments.config.schema import ROOTS, register_schemas
from keepdrop.experiments.training.train_settings import TrainSettings
from mkdocs.structure.files import File
from omegaconf import DictConfig, OmegaConf

CONF = "keepdrop.conf"
PAGE = "reference/options.md"
COMMON = {
    "_target_": "import path of a function or class",
    "_partial_": "the rest is given when a layer is known",
    "bn_images": "fit images on which batch normalisation is measured anew; 0 leaves it",
    "data.mean": "one number a channel",
    "data.path": "the .npz file",
    "data.std": "one number a channel",
    "depth": "layers: 6 n + 2",
    "flip": "mirror half of the images",
    "in_channels": "of an image",
    "json": "JSON instead of a table",
    "latency.batch_sizes": "images at once, one measurement each",
    "latency.repeats": "timed passes",
    "latency.runtimes": "eager, compile, onnxruntime, cuda-graphs, or all alone: whatever can be timed here",
    "latency.warmup": "passes before",
    "n_classes": "outputs",
    "padding": "pixels an image is shifted by at most, each way",
    "path": "the .npz file",
    "std": "one number a channel; null: those of the training images",
    "test_fraction": "of the images that are test images",
    "widths": "filters of each stage",
    "device": "cpu, cuda, cuda:1, mps, or auto",
    "layers": "names or globs of the layers to prune; null: all that can be",
    "quiet": "warnings and the result only",
    "random_seeds": "random allocations a seed",
    "run_dir": "folder of the run; a new one",
    "seed": "of everything drawn at random",
    "seeds": "each is a run of its own",
    "split.seed": "draws the reward images",
}


def on_files(files: Any, config: Any) -> Any:
    """Add the generated page."""
    files.append(File.generated(config, PAGE, content=options_page()))
    return files


def options_page() -> str:
    """The page, in Markdown: a table a command, then every option of every group."""
    lines = ["# All options", "", "Generated from `conf/` and the settings classes. Any key can be given as"]
    lines += ["`key=value`; `-m key=a,b` runs each value. `???` has to be given.", ""]
    for root in ROOTS:
        lines += [f"## keepdrop {root.replace('_', '-')}", "", *command_table(root), ""]
    lines += ["# Groups", "", "`GROUP=OPTION` chooses one; `GROUP.KEY=VALUE` changes it.", ""]
    for group, options in groups().items():
        lines += [f"## {group}", ""]
        for option in options:
            lines += option_lines(group, option)
    return "\n".join(lines) + "\n"


def command_table(root: str) -> list[str]:
    """Key, default and meaning of every setting of a command."""
    meanings = {**class_meanings(ROOTS[root]), **yaml_comments(_text(f"{root}.yaml"))}
    config = composed(root)
    chosen = set(groups()) & set(map(str, config))
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for key, value in leaves(config):
        if key.split(".")[0] not in chosen:
            meaning = meanings.get(key) or _elsewhere(key)
            if value is None and not meaning:
                meaning = "null: as in the run it comes from"
            rows.append(f"| `{key}` | `{_shown(value)}` | {_cell(meaning)} |")
    for group in sorted(chosen):
        rows.append(
            f"| [`{group}`](#{group}) | a group | one of {', '.join(f'`{each}`' for each in groups()[group])} |"
        )
    return rows


def _elsewhere(key: str) -> str:
    """What `keepdrop prune` says of a key, or the training settings of its last part."""
    ours = {**class_meanings(ROOTS["prune"]), **yaml_comments(_text("prune.yaml"))}
    return ours.get(key) or COMMON.get(key) or class_meanings(TrainSettings).get(key.rpartition(".")[2], "")


def option_lines(group: str, option: str) -> list[str]:
    """One option of a group: what it is, and its keys."""
    text = _text(f"{group}/{option}.yaml")
    node = OmegaConf.create(_without_defaults(text))
    comments = {**target_meanings(node), **yaml_comments(text)}
    first = next((line for line in text.splitlines() if line.startswith("# ") and "@package" not in line), "")
    lines = [f"### {group}={option}", "", first.removeprefix("# "), ""]
    rows = [
        f"| `{key}` | `{_shown(value)}` | {_cell(comments.get(key) or _elsewhere(key))} |"
        for key, value in leaves(node)
    ]
    return [*lines, "| key | value | |", "|---|---|---|", *rows, ""] if rows else lines


def composed(root: str) -> DictConfig:
    """The configuration of a command as it is without any override."""
    register_schemas()
    with initialize_config_module(CONF, version_base="1.3"):
        return compose(root)


def leaves(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and raw value (interpolations unresolved) of everything below a node."""
    raw = OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node
    for key, value in raw.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def yaml_comments(text: str) -> dict[str, str]:
    """Dotted key -> comment at the end of its line, and what the command's help says of a key."""
    found: dict[str, str] = {}
    parents: list[tuple[int, str]] = []
    for line in text.splitlines():
        if helped := re.match(r"\s{6}([\w.]+)(=\S+)?\s{2,}(?!\w+=)(\S.*)", line):
            found.setdefault(helped[1], helped[3])
        if not (match := re.match(r"( *)([\w]+):(?:\s+[^#]*?)?(?:\s+# (.*))?$", line)):
            continue
        indent, key, comment = len(match[1]), match[2], match[3]
        parents = [parent for parent in parents if parent[0] < indent]
        dotted = ".".join([*(name for _, name in parents), key])
        parents.append((indent, key))
        if comment:
            found[dotted] = comment
    return found


def class_meanings(kind: type, prefix: str = "") -> dict[str, str]:
    """Dotted key -> meaning, from the docstrings of nested settings classes."""
    found: dict[str, str] = {}
    hints = get_type_hints(kind)
    described = docstring_entries(kind.__doc__ or "")
    for each in fields(kind):
        found[f"{prefix}{each.name}"] = described.get(each.name, "")
        if is_dataclass(hints[each.name]):
            found |= class_meanings(hints[each.name], f"{prefix}{each.name}.")
    return found


def target_meanings(node: DictConfig) -> dict[str, str]:
    """Argument -> meaning, from the docstring of what a group's option builds."""
    if "_target_" not in node or OmegaConf.is_missing(node, "_target_"):
        return {}
    return docstring_entries(get_object(node._target_).__doc__ or "")


def docstring_entries(text: str) -> dict[str, str]:
    """`name: meaning` entries of an Args or Attributes section."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in cleandoc(text).splitlines():
        if match := re.match(r" {4}(\w[\w, ]*): (.*)", line):
            names = [name.strip() for name in match[1].split(",")]
            found |= dict.fromkeys(names, match[2])
        elif names and line.startswith(" " * 8):
            for name in names:
                found[name] += f" {line.strip()}"
        else:
            names = []
    return found


def _text(name: str) -> str:
    return (resources.files(CONF) / name).read_text(encoding="utf-8")


def _without_defaults(text: str) -> str:
    return re.sub(r"(?m)^defaults:\n(?:[ -].*\n)+", "", text)


def _shown(value: Any) -> str:
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    return text.replace("|", "\\|")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
