"""A mistake on the command line as one sentence: what came, what was expected, what to write instead."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from importlib import resources

from hydra import compose, initialize_config_module
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from ...envs.files.renamed import SETTINGS
from ...errors import UserError

CONF = "keepdrop.conf"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# Options of Hydra that take the next word as their value, and those that stand alone (with ours).
VALUED = (
    *("--cfg", "-c", "--package", "-p", "--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"),
    *("--info", "-i", "--shell-completion", "-sc", "--experimental-rerun"),
)
SINGLE = ("--help", "-h", "--hydra-help", "--resolve", "--run", "-r", "--multirun", "-m", "--quiet", "--debug")
_DECORATION = ("full_key:", "object_type=", "reference_type=", "See https://", "Config search path:", "provider=")


def explain(error: BaseException, root: str, arguments: Sequence[str]) -> str:
    """One sentence about `error`, which root configuration `root` raised while it read `arguments`."""
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} cannot be read; expected key=value (quote lists and spaces: 'layers=[conv1,conv2]')."
        )
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, MissingMandatoryValue):
        key = str(error).rsplit(": ", 1)[-1].splitlines()[0].strip()
        return f"{key} is not set; expected a value: give {key}=VALUE."
    if isinstance(error, OSError):
        return f"The disk does not take any more ({error.strerror}); what was there before is intact: free some space."
    text = str(error)
    if found := re.search(r"Could not override '(?:.*/)?([^'@]+)'", text):
        return _unknown_key(found[1], root, arguments)
    if found := re.search(r"Error merging override ([^=]+)=(.*)", text):
        return f"{found[1].lstrip('+')} is {found[2]!r}; expected {expected(error)}."
    return _bare(error)


def check_experiment(root: str, arguments: Sequence[str]) -> None:
    """Refuse an experiment whose launch line names another command than `root`, be it that its settings exist here."""
    name = next((each.partition("=")[2] for each in arguments if each.startswith("experiment=")), "")
    command, own = command_of(name), root.replace("_", "-")
    if command not in (None, own):
        raise UserError(f"experiment={name} is one of keepdrop {command}; expected one of keepdrop {own}: see --help.")


def command_of(experiment: str) -> str | None:
    """The command that starts an experiment, by the launch line at its head; None where there is neither."""
    file = resources.files(CONF) / "experiment" / f"{experiment}.yaml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"^# keepdrop (\S+) experiment=", text, re.MULTILINE)
    return None if found is None else found[1]


def nearest(word: str, known: Iterable[str]) -> str:
    """A suggestion from `known` that reads on after a semicolon, or the empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else ""


def check_flags(root: str, arguments: Sequence[str]) -> None:
    """Refuse a dash option that does not exist with the setting or the option that was meant."""
    takes_value = False
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        flag, _, value = argument.partition("=")
        if not takes_value and argument.startswith("-") and flag not in (*VALUED, *SINGLE):
            value = value or ("" if following.startswith("-") or "=" in following else following)
            raise UserError(_unknown_flag(flag, value, root, arguments))
        takes_value = argument in VALUED


def _unknown_flag(flag: str, value: str, root: str, arguments: Sequence[str]) -> str:
    key = flag.lstrip("-").replace("-", "_")
    keys = known_keys(root, [each for each in arguments if not each.startswith("-")])
    # The last word of a key is enough: --epochs is likelier finetune.epochs than nothing.
    leaves = {known.rpartition(".")[2]: known for known in reversed(keys)}
    near = key if key in keys else leaves.get(key) or next(iter(difflib.get_close_matches(key, keys, n=1)), "")
    option = difflib.get_close_matches(flag, [*SINGLE, *VALUED], n=1, cutoff=0.75)
    if option:
        hint = f"did you mean {option[0]}?"
    elif near:
        hint = f"settings are written without dashes: {near}={value or 'VALUE'}."
    else:
        hint = "settings are written key=value; --help lists the most used ones."
    return f"keepdrop {root.replace('_', '-')} has no option {flag!r}; {hint}"


def groups() -> dict[str, list[str]]:
    """Every configuration group with its options."""
    folders = [entry for entry in resources.files(CONF).iterdir() if entry.is_dir() and not entry.name.startswith("_")]
    found = {
        folder.name: sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))
        for folder in folders
    }
    return {name: options for name, options in sorted(found.items()) if options}


def known_keys(root: str, arguments: Sequence[str] = ()) -> list[str]:
    """Every key, dotted, of root configuration `root` with the options that `arguments` choose for its groups."""
    from .schema import register_schemas

    chosen = [argument for argument in arguments if argument.split("=")[0] in groups()]
    register_schemas()
    # Where a group is null by itself its option is added, not chosen anew.
    ways: tuple[list[str], ...] = (chosen, [f"+{each}" for each in chosen], [])
    with initialize_config_module(CONF, version_base="1.3"):
        for overrides in ways:
            with suppress(HydraException):
                return list(_flat(compose(root, overrides=overrides)))
    return []


def _flat(node: DictConfig, prefix: str = "") -> Iterator[str]:
    for key in map(str, node):
        yield f"{prefix}{key}"
        value = node._get_node(key)
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from _flat(value, f"{prefix}{key}.")


def _unknown_key(key: str, root: str, arguments: Sequence[str]) -> str:
    head, dot, rest = key.partition(".")
    if head in SETTINGS:
        return f"keepdrop {root.replace('_', '-')} has no setting {key!r}; it is '{SETTINGS[head]}{dot}{rest}' now."
    keys = known_keys(root, arguments)
    parent, _, last = key.rpartition(".")
    siblings = [known for known in keys if known.rpartition(".")[0] == parent]
    # A near name beside it is likelier meant than the same word somewhere else.
    hint = nearest(last, [sibling.rpartition(".")[2] for sibling in siblings])
    hint = hint.replace("'", f"'{parent}.", 1) if hint and parent else hint
    hint = hint or nearest(key, [known for known in keys if not key.startswith(f"{known}.")])
    command = root.replace("_", "-")
    fallback = f"expected one of {', '.join(siblings or [known for known in keys if '.' not in known])}."
    if f"{parent}._target_" in siblings:
        fallback += f" A new argument of your own function takes a plus: +{key}=VALUE."
    return f"keepdrop {command} has no setting {key!r}; {hint or fallback}"


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    options = groups().get(group, [])
    hint = nearest(option, options)
    return f"The group {group!r} has no option {option!r}; {f'{hint} It' if hint else 'it'} has {', '.join(options)}."


def expected(error: BaseException) -> str:
    """What a value that does not fit its setting should have been."""
    reason = str(error.__cause__ or error)
    if found := re.search(r"could not be converted to (\w+)|is not a valid (bool)", reason):
        kinds = {"Integer": "a whole number", "Float": "a number", None: "true or false"}
        return kinds.get(found[1], f"a value of type {found[1]}")
    if "is not a subclass of" in reason or "Cannot merge DictConfig with" in reason:
        return "settings below it: key.NAME=VALUE"
    if "is not a ListConfig" in reason:
        return "a list: 'key=[one,two]'"
    return f"another value ({reason.splitlines()[0]})"


def _bare(error: HydraException | OmegaConfBaseException | BaseException) -> str:
    """An error's text without the decoration of the library it comes from."""
    lines = [line.strip() for line in str(error).splitlines()]
    text = " ".join(line for line in lines if line and not line.startswith(_DECORATION))
    cause = str(error.__cause__).strip().splitlines() if error.__cause__ is not None else []
    return f"{text} ({cause[0]})" if cause and cause[0] not in text else text
