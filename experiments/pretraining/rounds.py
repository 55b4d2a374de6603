"""Rounds of a pretraining: try actions in every world, move the policy along the gradient of all, begin again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ...agent.learning.many_networks import improve
from ...agent.policies.group_policy import GroupPolicy
from ...agent.saved_agent import WEIGHTS, library_versions, load_agent, save_agent
from ...envs.group_descriptions import DESCRIPTION_NAMES, GENERAL
from ...envs.observation import STATISTIC_NAMES
from ...envs.surgery.targets import Target
from ...errors import UserError
from ..config.schema import PretrainingConfig, SplitConfig
from ..engines.engine import Engine, Workers
from ..engines.local_processes import LocalEngine
from ..pruning.agent_card import ANY_NETWORK, write_card
from ..runs.seeds import derive_seed
from .worlds import (
    CONTROLS,
    DamagedFileError,
    Subject,
    experience,
    read_record,
    target_name,
    tried,
    write_record,
)
from .zoo import ZooNetwork

WORLDS, AGENTS = "worlds", "agents"
SKIPPED = "skipped.json"
Show = Callable[[str, int, int], None]
"""Told what was done, how much of the round is done, and of how much."""


@dataclass(frozen=True)
class Pretraining:
    """One agent trained over a zoo, in a folder from which an interrupted training is resumed.

    Args:
        networks: of the zoo.
        splits: how the images of each are split.
        settings: how.
        folder: `worlds/NETWORK/` holds what was seen and tried, `agents/ROUND/` the policy after each round.
        seed: of everything.
        engine: its workers share the networks.
    """

    networks: Sequence[ZooNetwork]
    splits: SplitConfig
    settings: PretrainingConfig
    folder: Path
    seed: int = 0
    engine: Engine = field(default_factory=LocalEngine)

    @property
    def aims(self) -> list[Target]:
        """The targets."""
        return [Target(removed, "network") for removed in self.settings.targets]

    def run(self, show: Show) -> GroupPolicy:
        """All rounds that are missing; returns the last policy."""
        policy = self.policy(0)
        lost = (
            "A process was killed, perhaps because memory ran out; what is finished is kept: continue with "
            f"resume={self.folder}."
        )
        # Elsewhere this process's folder may have another relative path.
        there = replace(self, folder=self.folder.absolute(), engine=LocalEngine())
        with self.engine.open(_itself, there, lost=lost, here=self) as workers:
            for number in range(self.settings.rounds):
                self.sample(number, policy, show, workers)
                if not (self.folder / AGENTS / str(number + 1) / WEIGHTS).is_file():
                    self.learn(number, policy)
                policy = self.policy(number + 1)
        return policy

    def policy(self, number: int) -> GroupPolicy:
        """The policy after a number of rounds; after none the plan itself."""
        if number == 0:
            torch.manual_seed(derive_seed(self.seed, "policy"))
            return GroupPolicy(DESCRIPTION_NAMES, STATISTIC_NAMES, self.settings.hidden, read=GENERAL)
        policy = load_agent(self.folder / AGENTS / str(number)).policy
        assert isinstance(policy, GroupPolicy)
        return policy

    def sample(self, number: int, policy: GroupPolicy, show: Show, workers: Workers) -> None:
        """Try actions in every world where this round did not yet."""
        missing = [network for network in self.networks if self._missing(network, number)]
        show("", len(self.networks) - len(missing), len(self.networks))
        tried = workers.as_done(_sample, [(each, number, policy) for each in missing])
        for done, name in enumerate(tried, len(self.networks) - len(missing) + 1):
            show(name, done, len(self.networks))

    def learn(self, number: int, policy: GroupPolicy) -> None:
        """Move the policy along the gradient of this round and save it."""
        records = self.records(number)
        if not records:
            raise UserError(
                f"No network of the zoo can meet any of the targets {', '.join(map(str, self.aims))}; ask for less, or "
                "add networks: why each was skipped stands in worlds/*/*.skipped.json."
            )
        worlds = [experience(record) for record in records.values()]
        if number == 0:
            policy.normalise([world.rows for world in worlds])
        objective = improve(policy, worlds, self.settings.gradient)
        place, facts = self.folder / AGENTS / str(number + 1), self.facts(number, records, objective)
        save_agent(place, policy, facts)
        write_card(place, {**facts, "libraries": library_versions()})

    def records(self, number: int) -> dict[tuple[str, float], dict[str, Any]]:
        """What a round brought, by network and target."""
        return {
            (network.name, removed): read_record(file)
            for network in self.networks
            for removed, file in zip(self.settings.targets, self._files(network, number), strict=True)
            if file.is_file()
        }

    def facts(
        self, number: int, records: Mapping[tuple[str, float], Mapping[str, Any]], objective: Sequence[float]
    ) -> dict[str, Any]:
        """What is saved with the agent: what it was trained on, and what its policy did before this update."""
        gains = gains_of(records)
        return {
            "group": ANY_NETWORK,
            "description_names": list(DESCRIPTION_NAMES),
            "statistic_names": list(STATISTIC_NAMES),
            "rounds": number + 1,
            "settings": asdict(self.settings),
            "seed": self.seed,
            "networks": {each.name: each.family for each in self.networks},
            "worlds": len(records),
            "mask_evaluations": gains.pop("masks"),
            "gain_over_uniform": gains,
            "objective": [objective[0], objective[-1]],
        }

    def _files(self, network: ZooNetwork, number: int) -> list[Path]:
        own = self.folder / WORLDS / network.name
        return [own / f"{target_name(aim)}.round-{number}.json" for aim in self.aims]

    def _missing(self, network: ZooNetwork, number: int) -> list[Target]:
        files = self._files(network, number)
        skipped = self.folder / WORLDS / network.name
        return [
            aim
            for aim, file in zip(self.aims, files, strict=True)
            if not file.is_file() and not (skipped / f"{target_name(aim)}.{SKIPPED}").is_file()
        ]

    def sample_one(self, network: ZooNetwork, number: int, policy: GroupPolicy) -> str:
        """Try actions on one network at every target that is missing; returns its name."""
        own = self.folder / WORLDS / network.name
        subject = Subject(network, self.splits, self.settings.fit_images, self.settings.sampling, own)
        for aim in self._missing(network, number):
            name = target_name(aim)
            try:
                world = subject.world(aim)
                seed = derive_seed(self.seed, network.name, name, str(number))
                record = tried(world, policy, self.settings.sampling, seed)
            except DamagedFileError:
                raise
            except UserError as error:  # a target that this network cannot meet
                write_record(own / f"{name}.{SKIPPED}", {"reason": str(error)})
                continue
            write_record(own / f"{name}.round-{number}.json", record)
        return network.name


def _itself(training: Pretraining) -> Pretraining:
    return training


def _sample(training: Pretraining, item: tuple[ZooNetwork, int, GroupPolicy]) -> str:
    return training.sample_one(*item)


def gains_of(records: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean gain over equal shares of the policy and the plan, accuracy relative to the base's, and `masks` judged."""
    controls = [record["controls"] for record in records.values()]
    mean = {name: sum(each[name] - each["uniform"] for each in controls) / len(controls) for name in CONTROLS}
    return {**mean, "masks": sum(len(record["rewards"]) + len(CONTROLS) for record in records.values())}
