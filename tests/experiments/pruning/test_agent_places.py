"""Where agents lie: folders, runs, and the Hugging Face Hub with every network call replaced."""

import inspect
import json
import shutil
import sys
from types import SimpleNamespace

import keepdrop
import pytest
import torch
from keepdrop.agent.policies.group_policy import GroupPolicy
from keepdrop.agent.policies.network import NetworkPolicy
from keepdrop.agent.saved_agent import save_agent
from keepdrop.envs.group_descriptions import DESCRIPTION_NAMES
from keepdrop.envs.observation import STATISTIC_NAMES
from keepdrop.errors import UserError
from keepdrop.experiments.pruning.agent_card import ANY_NETWORK, agent_card
from keepdrop.experiments.pruning.agent_places import SHARED, agent_folders, fetch_agent, share_agent
from keepdrop.experiments.pruning.pretrained import load_pretrained
from keepdrop.experiments.pruning.trained_agents import load_agents

FACTS = {
    "group": ANY_NETWORK,
    "description_names": list(DESCRIPTION_NAMES),
    "statistic_names": list(STATISTIC_NAMES),
    "networks": {"one": "plain", "two": "plain", "three": "residual"},
    "settings": {"targets": [0.3, 0.5]},
    "rounds": 3,
    "worlds": 6,
    "mask_evaluations": 90,
    "gain_over_uniform": {"policy": 0.031, "plan": 0.02, "uniform": 0.0},
}


def reader(folder, **facts):
    """An agent that reads networks, in a folder."""
    torch.manual_seed(0)
    save_agent(folder, GroupPolicy(DESCRIPTION_NAMES, STATISTIC_NAMES, hidden=4), {**FACTS, **facts})
    return folder


def one_architecture(folder):
    """An agent of one architecture, in a folder."""
    policy = NetworkPolicy(2, len(STATISTIC_NAMES), "l2", STATISTIC_NAMES)
    save_agent(folder, policy, {"group": "network", "groups": ["a", "b"], "target": {"removed": 0.5}})
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """huggingface_hub without a network: repositories are folders, and what is called is noted."""
    root, calls = tmp_path / "hub", []

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        calls.append((repo_id, revision, tuple(allow_patterns)))
        if not (root / repo_id).is_dir():
            raise FileNotFoundError(f"404 no {repo_id}\nRequest ID: 1")
        cache = tmp_path / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        ignored = shutil.ignore_patterns("nothing")
        shutil.copytree(root / repo_id, cache, ignore=ignored)
        for file in cache.rglob("*"):
            if file.name not in allow_patterns:
                file.unlink()
        return str(cache)

    class HfApi:
        def create_repo(self, repo_id, private=None, exist_ok=False):
            assert exist_ok
            (root / repo_id).mkdir(parents=True, exist_ok=True)

        def upload_file(self, path_or_fileobj, path_in_repo, repo_id):
            (root / repo_id / path_in_repo).write_bytes(path_or_fileobj)

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            for name in allow_patterns:
                if (file := type(root)(folder_path) / name).is_file():
                    shutil.copy(file, root / repo_id / name)
            return f"https://hub/{repo_id}"

    module = SimpleNamespace(snapshot_download=snapshot_download, HfApi=HfApi)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return SimpleNamespace(root=root, calls=calls)


def test_an_agent_goes_up_and_comes_down_the_same(hub, tmp_path):
    folder = reader(tmp_path / "run" / "agent")
    (folder / "malware.py").write_text("raise SystemExit")
    assert keepdrop.share_agent(tmp_path / "run", "me/pruner") == "https://hub/me/pruner"
    assert sorted(each.name for each in (hub.root / "me/pruner").iterdir()) == sorted(SHARED)
    assert "| plain | one, two |" in (hub.root / "me/pruner/README.md").read_text()
    (hub.root / "me/pruner/malware.py").write_text("raise SystemExit")
    fetched = fetch_agent("me/pruner")
    assert sorted(each.name for each in fetched.iterdir()) == sorted(SHARED)
    ours, theirs = load_pretrained(folder), load_pretrained("hf://me/pruner@v1")
    assert hub.calls[-1] == ("me/pruner", "v1", SHARED)
    states = (ours.policy.state_dict().values(), theirs.policy.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    assert list(load_agents("hf://me/pruner")) == [ANY_NETWORK]


def test_a_card_of_ones_own_stays(hub, tmp_path):
    folder = reader(tmp_path / "agent")
    (folder / "README.md").write_text("mine")
    share_agent(folder, "hf://me/pruner")
    assert (hub.root / "me/pruner/README.md").read_text() == "mine"


def test_an_agent_of_one_architecture_is_shared_with_its_own_card(hub, tmp_path):
    one_architecture(tmp_path / "run/network/agent")
    share_agent(tmp_path / "run", "me/resnet")
    card = (hub.root / "me/resnet/README.md").read_text()
    assert "Layers: a, b." in card and "apply_agents" in card and "Target: removed 0.5." in card
    assert list(load_agents("hf://me/resnet")) == ["network"]


@pytest.mark.parametrize("name", ["pruner", "a/b/c", "", "hf://", "hf://a", "a b/c", "hf://a/b@"])
def test_names_that_are_no_repository(hub, name):
    with pytest.raises(UserError, match=r"names no repository; expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION\."):
        fetch_agent(name)
    assert not hub.calls


def test_what_cannot_be_fetched_or_shared_is_a_sentence(hub, tmp_path, monkeypatch):
    with pytest.raises(
        UserError, match=r"'hf://me/none' cannot be fetched \(FileNotFoundError: 404 no me/none\)"
    ) as said:
        load_pretrained("hf://me/none")
    assert "\n" not in str(said.value)
    (hub.root / "me/empty").mkdir(parents=True)
    with pytest.raises(UserError, match=r"There is no agent in 'me/empty': policy\.safetensors is missing"):
        fetch_agent("me/empty")
    with pytest.raises(UserError, match="expected OWNER/NAME without a revision"):
        share_agent(reader(tmp_path / "agent"), "me/pruner@v1")
    for layer in ("01-a", "02-b"):
        one_architecture(tmp_path / f"run/layers/{layer}/agent")
    with pytest.raises(UserError, match="has 2 agents; give the folder of one"):
        share_agent(tmp_path / "run", "me/pruner")
    monkeypatch.setattr(sys.modules["huggingface_hub"], "HfApi", lambda: 1 / 0)
    with pytest.raises(UserError, match=r"cannot be shared as 'me/pruner' .*ZeroDivisionError"):
        share_agent(tmp_path / "agent", "me/pruner")


def test_without_the_extra_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for call in (lambda: fetch_agent("me/pruner"), lambda: share_agent(reader(tmp_path / "agent"), "me/pruner")):
        with pytest.raises(UserError, match=r"run pip install 'keepdrop\[hub\]', or give a folder"):
            call()


def test_the_client_takes_what_is_given_to_it():
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (extra 'hub')")
    inspect.signature(hub.snapshot_download).bind(repo_id="a/b", revision=None, allow_patterns=["x"])
    inspect.signature(hub.HfApi.create_repo).bind(None, "a/b", private=True, exist_ok=True)
    inspect.signature(hub.HfApi.upload_file).bind(None, path_or_fileobj=b"", path_in_repo="x", repo_id="a/b")
    inspect.signature(hub.HfApi.upload_folder).bind(None, repo_id="a/b", folder_path="x", allow_patterns=["x"])


def test_folders_of_agents(tmp_path):
    own, trained = reader(tmp_path / "own"), reader(tmp_path / "run/agent")
    reader(tmp_path / "run/agents/1")
    whole = one_architecture(tmp_path / "pruned/network/agent")
    assert agent_folders(own) == [own] and agent_folders(tmp_path / "run") == [trained]
    assert agent_folders(tmp_path / "pruned") == [whole]
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="No trained agent in"):
        agent_folders(tmp_path / "nothing")


def test_agents_that_read_no_networks_are_refused(tmp_path):
    with pytest.raises(UserError, match="was trained for one architecture"):
        load_pretrained(one_architecture(tmp_path / "run/network/agent").parents[1])
    with pytest.raises(UserError, match=rf"the agent in file://{tmp_path}/run/network/agent was trained"):
        load_pretrained(f"file://{tmp_path}/run")
    with pytest.raises(UserError, match=r"agents is 'nowhere'; expected 'pretrained', or the folder"):
        load_pretrained("nowhere")
    other = reader(tmp_path / "other", description_names=["planned"])
    with pytest.raises(UserError, match="was trained for description_names"):
        load_pretrained(other)
    assert load_pretrained(load_pretrained(reader(tmp_path / "fine"))).facts["rounds"] == 3


def test_a_card_says_what_is_known():
    card = agent_card(FACTS)
    assert card.startswith("---\nlibrary_name: keepdrop\nlicense: apache-2.0\n")
    for part in (
        "| plain | one, two |",
        "| residual | three |",
        "30 %, 50 %",
        "+3.1 points",
        "+2.0",
        "hf://OWNER/NAME",
    ):
        assert part in card
    assert "## Licence" in agent_card({}) and json.dumps(FACTS)
