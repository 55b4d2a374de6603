"""Saved agents: round trip, refusals with both values, full disks and kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from keepdrop.agent.policies.layer_matrix import LayerMatrixPolicy
from keepdrop.agent.policies.set_policy import SetPolicy
from keepdrop.agent.saved_agent import AgentMismatch, check_agent, load_agent, save_agent

FACTS = {"group": "layer1.0.conv1", "n_filters": 16, "statistic_names": ["l1", "taylor"], "best_step": 3}


def observe() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"weights": torch.randn(16, 9, generator=generator), "statistics": torch.randn(16, 2, generator=generator)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: SetPolicy(2, hidden=8, warm_start="l1", statistic_names=("l1", "taylor"), exploration="bernoulli"),
        lambda: SetPolicy(2, quantiles=(0.5,)),
        lambda: LayerMatrixPolicy(16, 9, exploration="budget"),
        lambda: LayerMatrixPolicy(16, 128, channels=(2,)),
    ],
)
def test_round_trip(make: Any, tmp_path: Path) -> None:
    policy = make()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    save_agent(tmp_path / "a", policy, FACTS)
    agent = load_agent(tmp_path / "a")
    assert type(agent.policy) is type(policy)
    assert agent.policy.kwargs == policy.kwargs
    loaded = agent.policy.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(value, loaded[key]) for key, value in policy.state_dict().items())
    assert {key: agent.facts[key] for key in FACTS} == FACTS
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["facts.json", "policy.safetensors"]


def test_a_loaded_agent_decides_the_same(tmp_path: Path) -> None:
    policy = SetPolicy(2, warm_start="l1", statistic_names=("l1", "taylor"))
    save_agent(tmp_path, policy, FACTS)
    assert torch.equal(load_agent(tmp_path).policy(observe()).logits, policy(observe()).logits)


def test_check_agent_names_both_values(tmp_path: Path) -> None:
    save_agent(tmp_path, SetPolicy(2), FACTS)
    agent = load_agent(tmp_path)
    check_agent(agent, group="layer1.0.conv1", n_filters=16, statistic_names=("l1", "taylor"))
    with pytest.raises(
        AgentMismatch, match=r"trained for group 'layer1.0.conv1', but is to be used for 'layer2.0.conv1'"
    ):
        check_agent(agent, group="layer2.0.conv1")
    with pytest.raises(
        AgentMismatch, match=r"statistic_names \['l1', 'taylor'\], but is to be used for \['taylor', 'l1'\]"
    ):
        check_agent(agent, statistic_names=("taylor", "l1"))
    with pytest.raises(AgentMismatch, match="does not say its base_hash, but 'abc' is needed"):
        check_agent(agent, base_hash="abc")


def edit(folder: Path, **changes: Any) -> None:
    facts = json.loads((folder / "facts.json").read_text())
    (folder / "facts.json").write_text(json.dumps({**facts, **changes}))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format_version": 2}, "has format version 2, but this keepdrop reads 1; train it again"),
        (
            {"policy": {"kind": "os.system", "kwargs": {}}},
            "uses the policy 'os.system', but known are GroupPolicy, LayerMatrixPolicy, NetworkPolicy, Set",
        ),
        ({"policy": None}, "uses the policy None"),
        ({"policy": {"kind": "SetPolicy", "kwargs": {"n": 2}}}, "SetPolicy in .* cannot be rebuilt from its facts"),
        (
            {"policy": {"kind": "SetPolicy", "kwargs": {"n_statistics": 3}}},
            r"context.weight is \(64, 132\), but the policy has \(64, 134\)",
        ),
    ],
)
def test_facts_that_do_not_fit(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    save_agent(tmp_path, SetPolicy(2), FACTS)
    edit(tmp_path, **changes)
    with pytest.raises(AgentMismatch, match=text):
        load_agent(tmp_path)


def test_no_agent_there(tmp_path: Path) -> None:
    with pytest.raises(AgentMismatch, match=r"there is no agent in .*: policy.safetensors is missing"):
        load_agent(tmp_path / "nowhere")


def test_facts_are_whole_without_the_readable_copy(tmp_path: Path) -> None:
    save_agent(tmp_path, SetPolicy(2), FACTS)
    (tmp_path / "facts.json").unlink()
    assert load_agent(tmp_path).facts["group"] == "layer1.0.conv1"


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_unreadable_facts(tmp_path: Path, text: str) -> None:
    save_agent(tmp_path, SetPolicy(2), FACTS)
    (tmp_path / "facts.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(AgentMismatch, match=r"facts.json"):
        load_agent(tmp_path)


def test_damaged_weights_never_end_in_another_error(tmp_path: Path) -> None:
    """Cut everywhere and flip header bytes: either refused, or the same weights."""
    save_agent(tmp_path, SetPolicy(2, hidden=4), FACTS)
    data = (tmp_path / "policy.safetensors").read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    damaged = [data[:n] for n in (0, 4, 8, 20, header, len(data) - 1)]
    damaged += [data[:i] + bytes([data[i] ^ 0x55]) + data[i + 1 :] for i in range(0, header, 7)]
    refused = 0
    for bad in damaged:
        (tmp_path / "policy.safetensors").write_bytes(bad)
        try:
            load_agent(tmp_path)
        except AgentMismatch:
            refused += 1
    assert refused > len(damaged) / 2


class OwnPolicy(SetPolicy):
    """A user's policy."""


def test_own_policies_need_their_class(tmp_path: Path) -> None:
    save_agent(tmp_path, OwnPolicy(2), FACTS)
    with pytest.raises(AgentMismatch, match=r"uses the policy 'OwnPolicy', but known are .*; give its class"):
        load_agent(tmp_path)
    assert type(load_agent(tmp_path, {"OwnPolicy": OwnPolicy}).policy) is OwnPolicy


def test_nothing_is_written_for_facts_that_json_cannot_hold(tmp_path: Path) -> None:
    save_agent(tmp_path, SetPolicy(2), FACTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        save_agent(tmp_path, SetPolicy(2), {"mask": torch.zeros(3)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


SAVE_ON_A_FULL_DISK = """
import resource, signal, sys
from keepdrop.agent.policies.set_policy import SetPolicy
from keepdrop.agent.saved_agent import save_agent
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_agent(sys.argv[1], SetPolicy(2, seed=1), {"group": "new"})
except ValueError:
    sys.exit(7)
"""

SAVE_FOREVER = """
import sys, torch
torch.set_num_threads(1)
from keepdrop.agent.policies.set_policy import SetPolicy
from keepdrop.agent.saved_agent import save_agent
policies = [SetPolicy(2, seed=0), SetPolicy(2, seed=1)]
n = 0
while True:
    save_agent(sys.argv[1], policies[n % 2], {"group": n % 2})
    n += 1
    if n == 2:
        print("saving", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_leaves_the_old_agent(tmp_path: Path) -> None:
    save_agent(tmp_path, SetPolicy(2), FACTS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run = subprocess.run([sys.executable, "-c", SAVE_ON_A_FULL_DISK, str(tmp_path)], check=False)
    assert run.returncode == 7
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is POSIX")
def test_a_killed_save_leaves_a_whole_agent(tmp_path: Path) -> None:
    wanted = [SetPolicy(2, seed=seed).state_dict()["encode.weight"] for seed in (0, 1)]
    for wait in (0.001, 0.0123):
        process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        agent = load_agent(tmp_path)
        loaded = agent.policy.state_dict()["encode.weight"]  # type: ignore[attr-defined]
        assert torch.equal(loaded, wanted[agent.facts["group"]])


def test_a_kill_between_the_two_files_is_no_mixture(tmp_path: Path) -> None:
    save_agent(tmp_path, SetPolicy(2, seed=0), {"group": "old"})
    old_facts = (tmp_path / "facts.json").read_bytes()
    save_agent(tmp_path, SetPolicy(2, seed=1), {"group": "new"})
    (tmp_path / "facts.json").write_bytes(old_facts)
    assert load_agent(tmp_path).facts["group"] == "new"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
def test_nan_and_absurd_weights_are_refused(tmp_path: Path, value: float) -> None:
    policy = SetPolicy(2)
    with torch.no_grad():
        policy.residual.weight[0, 0] = value
    save_agent(tmp_path, policy, FACTS)
    with pytest.raises(AgentMismatch, match=r"NaN, infinite or absurdly large weights in residual\.weight"):
        load_agent(tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    save_agent(tmp_path, SetPolicy(2), FACTS)
    content = bytearray((tmp_path / "policy.safetensors").read_bytes())
    content[-100] ^= 1
    (tmp_path / "policy.safetensors").write_bytes(content)
    with pytest.raises(AgentMismatch, match="its sha256 differs"):
        load_agent(tmp_path)


@pytest.mark.parametrize("size", [200_000, 10**6, 10**12, -1])
def test_sizes_are_compared_before_memory_is_asked_for(tmp_path: Path, size: int) -> None:
    """Two matrices of 10**6 x 2 * 10**6 would be 16 terabytes; 200,000 x 400,000 are 320 gigabytes."""
    from safetensors.torch import save

    facts = {"format_version": 1, "policy": {"kind": "SetPolicy", "kwargs": {"n_statistics": 2, "hidden": size}}}
    state = {key: value.contiguous() for key, value in SetPolicy(2).state_dict().items()}
    (tmp_path / "policy.safetensors").write_bytes(save(state, metadata={"facts": json.dumps(facts)}))
    with pytest.raises(AgentMismatch, match=r"do not fit its policy|cannot be rebuilt from its facts: hidden is"):
        load_agent(tmp_path)
