"""Where agents lie: a run, an agent's own folder, either at a URL, keepdrop's pretrained one, or on the Hub (`hf://`)."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ...agent.saved_agent import FACTS, WEIGHTS, load_agent
from ...errors import UserError, summarised
from ...remote import is_url, local, named
from .agent_card import CARD, agent_card
from .decide import AGENT

PRETRAINED = "pretrained"
"""The agent that comes with keepdrop, as `agents=pretrained`."""
BUNDLED = Path(__file__).resolve().parents[2] / "agent" / "pretrained"
PLACES = ("network", "layers/**")  # in a run's folder
SHARED = (WEIGHTS, FACTS, CARD)  # nothing else leaves a folder, and nothing else is fetched: never code
ON_HUB = re.compile(r"hf:/{1,2}(?P<name>[^/@\s]+/[^/@\s]+)(?:@(?P<revision>\S+))?")
FOLDER = "the folder= of an earlier keepdrop.prune, or a run folder of the command."
RUN = "a run folder of keepdrop prune or train-agent."


def is_place(where: str | Path) -> bool:
    """Whether a word means a folder or a repository rather than something else; nothing is fetched."""
    return str(where) == PRETRAINED or str(where).startswith("hf:") or is_url(where) or Path(where).is_dir()


def is_bare(where: str | Path) -> bool:
    """Whether an agent lies there by itself, without the configuration of a run that pruned with it."""
    path = local_folder(where)
    return (path / WEIGHTS).is_file() or (path / AGENT / WEIGHTS).is_file()


def local_folder(where: str | Path) -> Path:
    """The folder behind a place; a repository is fetched into the cache of huggingface_hub first, a URL likewise."""
    if str(where) == PRETRAINED:
        return BUNDLED
    return fetch_agent(str(where)) if str(where).startswith("hf:") else local(where, is_of_agents)


def is_of_agents(name: str) -> bool:
    """Whether a file of a run, by its name below the folder, is one of its agents or says what it was asked."""
    of_run = "/" not in name.partition("/")[2] and name.endswith((".yaml", ".json"))  # or of a job of a sweep
    return of_run or name.rpartition("/")[2] in SHARED


def naming(where: str | Path) -> AbstractContextManager[None]:
    """Inside, what is said of the copy of a place at a URL names the URL."""
    return named(local_folder(where), where) if is_url(where) else nullcontext()


def agent_folders(where: str | Path) -> list[Path]:
    """Folders of all agents at a place, in the order of the run: the one that lies there, or those of a run or a sweep.

    Raises:
        UserError: there is no such folder, or no agent in it.
    """
    path, where = local_folder(where), str(where)
    if not path.is_dir():
        raise UserError(f"{where!r} is not a folder; expected", FOLDER, RUN)
    if own := [each for each in (path, path / AGENT) if (each / WEIGHTS).is_file()]:
        return own[:1]
    # A run, or the jobs of a sweep; `/` or a home folder by mistake is not searched through.
    found = {
        each for start in ("", "*/") for place in PLACES for each in path.glob(f"{start}{place}/{AGENT}/{WEIGHTS}")
    }
    folders = [file.parent for file in sorted(found) if ".partial" not in str(file)]
    if not folders:
        look = f"{RUN.rstrip('.')}: look for one with layers/*/{AGENT}."
        raise UserError(f"No trained agent in {where!r}; expected", FOLDER, look)
    return folders


def fetch_agent(repository: str, revision: str | None = None) -> Path:
    """Download an agent from the Hugging Face Hub; weights, facts and card alone, never code.

    Args:
        repository: OWNER/NAME, or as commands take it, hf://OWNER/NAME or hf://OWNER/NAME@REVISION.
        revision: a branch, tag or commit; None: the newest.

    Returns:
        A folder in the cache of huggingface_hub, for `agents=`; without a connection the one that is there already.

    Raises:
        UserError: huggingface_hub is not installed, there is no such repository, or it holds no agent.
    """
    name, named = _parsed(repository)
    revision = revision or named
    hub = _hub()
    try:
        folder = Path(hub.snapshot_download(repo_id=name, revision=revision, allow_patterns=list(SHARED)))
    except Exception as error:  # the client's own errors, those of its transport, of the disk
        raise UserError(
            f"The agent {repository!r} cannot be fetched ({summarised(error)}); check name, revision and connection, "
            "log in with `hf auth login` if it is private, or give a folder."
        ) from error
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"There is no agent in {repository!r}: {WEIGHTS} is missing; expected one from share_agent.")
    return folder


def share_agent(folder: str | Path, repository: str, private: bool = False) -> str:
    """Put an agent into a Hugging Face repository, with a model card; `agents=hf://OWNER/NAME` takes it from there.

    Args:
        folder: an agent's own, or of a run with one agent (of `keepdrop pretrain`, or of `prune` with a target). A
            card, README.md, that lies there already stays as it is; facts.json goes along, as the run wrote it.
        repository: OWNER/NAME; made if it does not exist.
        private: whether only its owner sees a new one.

    Returns:
        The address of what was uploaded.

    Raises:
        UserError: no agent or several ones, huggingface_hub is not installed, or the upload failed.
    """
    name, revision = _parsed(repository)
    if revision is not None:
        raise UserError(f"repository is {repository!r}; expected OWNER/NAME without a revision.")
    found = agent_folders(folder)
    if len(found) > 1:
        raise UserError(f"{str(folder)!r} has {len(found)} agents; give the folder of one, such as {str(found[0])!r}.")
    agent, hub = load_agent(found[0]), _hub()
    try:
        client = hub.HfApi()
        client.create_repo(name, private=private, exist_ok=True)
        if not (found[0] / CARD).is_file():
            card = agent_card(agent.facts).encode()
            client.upload_file(path_or_fileobj=card, path_in_repo=CARD, repo_id=name)
        address = client.upload_folder(repo_id=name, folder_path=str(found[0]), allow_patterns=list(SHARED))
    except Exception as error:  # as above
        raise UserError(
            f"The agent cannot be shared as {repository!r} ({summarised(error)}); check name and connection, and log "
            "in with `hf auth login`."
        ) from error
    return str(address)


def _parsed(repository: str) -> tuple[str, str | None]:
    text = repository if repository.startswith("hf:") else f"hf://{repository}"
    found = ON_HUB.fullmatch(text)
    if found is None:
        raise UserError(f"{repository!r} names no repository; expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION.")
    return found["name"], found["revision"]


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            "Agents on the Hugging Face Hub need huggingface_hub, which is not installed; run pip install "
            "'keepdrop[hub]', or give a folder."
        ) from error
    return huggingface_hub
