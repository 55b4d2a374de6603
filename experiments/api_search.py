"""The two ways a network is searched from Python: an agent for each layer, or one for all layers at a MACs target."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ..agent.saved_agent import save_agent
from ..agent.trainer import AgentSettings
from ..envs.joint import JointTask
from ..envs.pruned_file import KeptChannels
from ..envs.reconstruction import ReconstructionSettings
from ..envs.target import Target
from ..envs.task import LayerTask, PruningTask, replace_model
from ..rewards.outcome import RewardFunction
from .api_progress import Reporter
from .checks import PolicyFactory, call_policy_factory
from .decide import Decision
from .network_search import NetworkAgent, NetworkSearchSettings
from .schedule import LayerRecord, Recovery
from .search import agent_facts, train_on_layer
from .seeds import derive_seed


class LayerAgents:
    """Trains a fresh agent on each layer; saves it in the layer's folder.

    Args:
        make_policy: see `call_policy_factory`.
        reward: what an agent is trained on.
        settings: how it is trained.
        masks, images: sampled an update, and reward images a mask (None: all).
        reporter: told about every update.
    """

    def __init__(
        self,
        make_policy: PolicyFactory,
        reward: RewardFunction,
        settings: AgentSettings,
        masks: int,
        images: int | None,
        reporter: Reporter,
    ) -> None:
        self.make_policy, self.reward, self.settings = make_policy, reward, settings
        self.masks, self.images, self.reporter = masks, images, reporter

    def __call__(self, layer: LayerTask, working: Path, seed: int) -> Decision:
        """Train on `layer` and decide."""
        n_filters, n_weights = layer.observation.weights.shape
        policy = call_policy_factory(self.make_policy, n_filters, n_weights, derive_seed(seed, "policy"))
        result, decision = train_on_layer(
            layer,
            policy,
            self.reward,
            self.settings,
            masks=self.masks,
            images=self.images,
            seed=seed,
            report=self.reporter.update,
        )
        save_agent(working / "agent", policy, agent_facts(layer, seed, result))
        return decision


def prune_to_target(
    task: PruningTask,
    target: Target,
    drop_bound: float,
    settings: NetworkSearchSettings,
    recover: Recovery | None,
    reporter: Reporter,
    seed: int,
    state: Path,
) -> tuple[PruningTask, KeptChannels, list[LayerRecord]]:
    """Choose all layers at once so that `target` is met, cut, repair in closed form and recover.

    Accuracies, the bound and seconds in the records are those of the whole network; `state` keeps the training.
    """
    started = time.perf_counter()
    repair = ReconstructionSettings()
    agent = NetworkAgent(settings, repair, reporter.network, state)
    choices = agent.choose(task, target, seed)
    joint = JointTask(task, repair)
    keep = joint.joined(choices)
    cut = replace_model(task, joint.cut(keep))
    searched = time.perf_counter()
    model = cut.model if recover is None else recover(cut, derive_seed(seed, "recovery"), state.parent)
    recovered = replace_model(task, model)
    seconds = (searched - started, time.perf_counter() - searched)
    records = _records(
        task, choices, agent.facts["decided_by"], (cut.accuracy, recovered.accuracy), drop_bound, seconds
    )
    for position, record in enumerate(records):
        reporter.layer_ends(position, len(records), record)
    return recovered, KeptChannels().after(task.model, joint.choices(keep)), records


def _records(
    task: PruningTask,
    choices: Mapping[str, Tensor],
    decided_by: str,
    accuracies: tuple[float, float],
    drop_bound: float,
    seconds: tuple[float, float],
) -> list[LayerRecord]:
    pruned, recovered = accuracies
    return [
        LayerRecord(
            name=group.name,
            n_filters=group.n_filters,
            n_kept=int(choices[group.name].sum()),
            keep=choices[group.name].tolist(),
            decided_by=decided_by,
            pruned_accuracy=pruned,
            recovered_accuracy=recovered,
            within_bound=task.base.accuracy - pruned <= drop_bound + 1e-9,
            search_seconds=seconds[0],
            recovery_seconds=seconds[1],
            facts={},
        )
        for group in task.groups
    ]
