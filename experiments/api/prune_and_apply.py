"""The Python interface: a trained network and two datasets in, a smaller network out. No configuration files.

With the same settings and the same seed it decides what `keepdrop prune` decides, filter by filter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ...agent.policies.policy import Policy
from ...agent.saved_agent import SavedAgent
from ...envs.networks.checkpoint import hash_state
from ...envs.one_shot import GROUP_NAME
from ...envs.repair.reconstruction import ReconstructionSettings
from ...envs.surgery.targets import Target
from ...errors import UserError
from ...rewards.try_and_learn import TryAndLearn, check_drop_bound
from ..deploy.clock import kept_profile
from ..engines.engine import Engine
from ..engines.local_processes import LocalEngine
from ..pruning.agent_card import ANY_NETWORK
from ..pruning.halving import Training
from ..pruning.input_checks import check_fineness
from ..pruning.layer_agents import TrainLayerAgents
from ..pruning.network_decide import AskNetworkAgent, AskPretrainedAgent, NetworkDecider, TrainNetworkAgent
from ..pruning.network_schedule import NetworkSchedule
from ..pruning.pretrained import load_pretrained, needs_target
from ..pruning.schedule import Recovery, Schedule
from ..pruning.trained_agents import AskAgents, agents_of, check_agents, load_agents
from ..training.augment import Augment
from ..training.train_settings import TrainSettings
from .job import Job, Profile
from .own_training_loop import OwnLoop
from .progress import Callback
from .result import PruningResult
from .settings import FINETUNE, Settings

Policies = Mapping[str, Callable[..., Policy]]


def prune(
    model: nn.Module,
    train: Any,
    test: Any,
    *,
    macs_removed: float | None = None,
    latency: float | None = None,
    milliseconds: float | None = None,
    params: float | None = None,
    bytes: int | None = None,
    profile: Profile | None = None,
    drop_bound: float = 0.02,
    layers: Sequence[str] | None = None,
    recover: TrainSettings | OwnLoop | None = None,
    finetune: TrainSettings | OwnLoop | None = FINETUNE,
    augment: Augment | None = None,
    settings: Settings | None = None,
    progress: Callback | None = None,
    folder: str | Path | None = None,
    agents: str | Path | SavedAgent | None = None,
    warm_start: str | Path | None = None,
    policies: Policies | None = None,
    engine: Engine | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> PruningResult:
    """Train an agent on each layer, remove filters for real, fine-tune, and measure on images nothing was chosen on.

    Args:
        model: trained, maps images (B, C, H, W) to logits (B, classes), or to what the metric takes; never changed.
        train, test: each a map-style dataset or a DataLoader of (image, integer label), or a pair of tensors or arrays
            (images, labels), normalised as the network takes them; with another metric than top-1 targets of any shape.
            A network with several inputs takes items ((left, right), label) or ({"name": input, ...}, label).
        macs_removed: a target, the fraction of the network's MACs to remove (0.4: 40 %): one agent chooses all layers
            at once. Without any target one agent per layer removes what `drop_bound` allows.
        latency: a target, the fraction of the network's time that may be left (0.6: 60 %), on the device at hand.
        milliseconds: a target, the time of a pass that may be left.
        params: a target, the fraction of the network's parameters that may be left.
        bytes: a target, the size that the file of the weights may have. Of several targets all hold.
        profile: measured times of this network on this device (`keepdrop profile`), for targets and rewards of time;
            None: what is needed (`settings.profile`) is measured first.
        drop_bound: accuracy that may be lost before fine-tuning, a fraction (0.02: two points). With a target it stops
            nothing: `bound_held` says whether it held.
        layers: names or globs of the layers to prune; None: all that can be.
        recover: training after each cut, kept only where it helps: settings, or a function that trains a network in
            place with a loop of your own; None: none.
        finetune: training at the end, likewise; of the cut network and what it led to the better one is returned.
        augment: of training images, (images, generator) -> images.
        settings: how the search goes.
        progress: called with a `Progress` for every update, layer and epoch; `print` will do.
        folder: a path or URL (s3://...) that keeps agents, decisions and networks; called again with the same arguments
            it resumes a run that was interrupted.
        agents: an agent trained over other networks decides at the target, without a search: "pretrained" (keepdrop's
            own), the folder or URL of one, a run of `keepdrop pretrain`, "hf://OWNER/NAME", or one that is loaded
            already.
        warm_start: the folder of an earlier run, of this function or of `keepdrop prune`: each layer that has an agent
            there trains that one further.
        policies: classes of one's own that those agents were made of, by name.
        engine: where the masks of a target's agent are judged: this process (None), `LocalEngine(workers=2)` or
            `RayEngine(address="auto")`; the decision is the same.
        seed: same seed, same result, bit for bit on a CPU.
        device: "cpu", "cuda", "mps" or "auto".

    Raises:
        UserError: what was given cannot be used; the sentence says why and what to do.
    """
    check_drop_bound(drop_bound)
    target = _target(macs_removed, latency, milliseconds, params, bytes)
    if target is None and settings is not None and settings.surgery.whole_blocks:
        raise UserError(
            "Limits(whole_blocks=True) would do nothing: an agent a layer always keeps a filter of it; give a target, "
            "as in macs_removed=0.5."
        )
    reader = _reader(agents, warm_start, target, settings)
    engine = engine or LocalEngine()
    if not engine.is_here and (target is None or reader is not None):
        raise UserError(
            "engine would do nothing: it judges the masks of an agent that is trained for a target; give one, as in "
            "macs_removed=0.5, without agents."
        )
    job = Job(
        model,
        train,
        test,
        layers=layers,
        augment=augment,
        settings=settings,
        progress=progress,
        seed=seed,
        device=device,
        target=target,
        profile=kept_profile(folder) or profile,
    )
    check_fineness(drop_bound, len(job.splits.reward))
    known = _warm(job, warm_start, policies, target)
    asked = {"drop_bound": drop_bound, "layers": layers, "recover": recover, **_asked(target)}
    job.check_training(finetune, recover)
    recovery = job.recovery(recover)
    if target is not None and reader is not None:
        decide = AskPretrainedAgent(reader, target)
        named = _named({ANY_NETWORK: reader})
        return job.run(_at_once(decide, job, recovery, drop_bound), finetune, folder, asked | named)
    if target is not None:
        tuning = finetune if isinstance(finetune, TrainSettings) else FINETUNE
        training = Training(tuning, augment, job.reporter.finalist)
        engine.check(device=str(job.task.device))
        agent = TrainNetworkAgent(job.settings.network, target, job.reporter.network, training=training, engine=engine)
        return job.run(_at_once(agent, job, recovery, drop_bound), finetune, folder, asked)
    chosen = job.settings
    reward = chosen.reward or TryAndLearn(drop_bound)
    train_agents = TrainLayerAgents(
        chosen.policy, reward, chosen.agent, chosen.masks, chosen.images, job.reporter.layer_update, known
    )
    schedule = Schedule(train_agents, reward, drop_bound, recovery, chosen.order, seed)
    return job.run(schedule, finetune, folder, asked | _named(known))


def apply_agents(
    agents: str | Path,
    model: nn.Module,
    train: Any,
    test: Any,
    *,
    macs_removed: float | None = None,
    latency: float | None = None,
    milliseconds: float | None = None,
    params: float | None = None,
    bytes: int | None = None,
    profile: Profile | None = None,
    drop_bound: float = 0.02,
    recover: TrainSettings | OwnLoop | None = None,
    finetune: TrainSettings | OwnLoop | None = FINETUNE,
    augment: Augment | None = None,
    settings: Settings | None = None,
    progress: Callback | None = None,
    folder: str | Path | None = None,
    policies: Policies | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> PruningResult:
    """Let trained agents decide on a network they have never seen, without training them; the rest is `prune`'s.

    Args:
        agents: the folder of an earlier run, of `prune(..., folder=...)` or of the command line, or that of one agent;
            "hf://OWNER/NAME"; "pretrained", which reads any network.
        model: another training of the same architecture (any for an agent that reads networks); never changed.
        train, test, recover, finetune, augment, progress, folder, seed, device: as for `prune`.
        macs_removed, latency, milliseconds, params, bytes: targets for an agent of a whole network; without any, what
            it was trained for; an agent that reads networks needs one.
        profile: as for `prune`.
        drop_bound: accuracy that may be lost before fine-tuning; it stops nothing, `bound_held` says whether it held.
        settings: `evaluation`, `order`, `bn_images`, `surgery`, `metric` and the reward images matter here.
        policies: classes of one's own that the agents were made of, by name.

    Raises:
        UserError: there are no agents, or they do not fit the network.
    """
    check_drop_bound(drop_bound)
    known = load_agents(agents, policies)
    reader = known.get(ANY_NETWORK)
    layers = list(known[GROUP_NAME].facts["groups"]) if GROUP_NAME in known else None if reader else list(known)
    target = _target(macs_removed, latency, milliseconds, params, bytes)
    if reader is not None and target is None:
        raise needs_target("macs_removed=0.5")
    if target is not None and GROUP_NAME not in known and reader is None:
        name = target.resources[0].replace("removed", "macs_removed")
        raise UserError(
            f"{name} is {getattr(target, target.resources[0]):g}, but the agents in {str(agents)!r} decide layer by "
            "layer; leave it out, or give an agent of a whole network."
        )
    wanted = target
    if GROUP_NAME in known and target is None:
        target = Target(**known[GROUP_NAME].facts["target"])
    job = Job(
        model,
        train,
        test,
        layers=layers,
        augment=augment,
        settings=settings,
        progress=progress,
        seed=seed,
        device=device,
        target=target,
        profile=kept_profile(folder) or profile,
    )
    check_agents(known, job.task)
    job.check_training(finetune, recover)
    recovery = job.recovery(recover)
    asked = {"recover": recover, **_asked(wanted), **_named(known)}
    if reader is not None and target is not None:
        schedule: Schedule | NetworkSchedule = _at_once(AskPretrainedAgent(reader, target), job, recovery, None)
    elif GROUP_NAME in known:
        schedule = _at_once(AskNetworkAgent(known[GROUP_NAME], target), job, recovery, None)
    else:
        schedule = Schedule(AskAgents(known), None, None, recovery, job.settings.order, seed)
    result = job.run(schedule, finetune, folder, asked)
    held = job.task.base.accuracy - result.layers[-1].pruned_accuracy <= drop_bound + 1e-9
    return replace(result, bound_held=held)


def _at_once(decide: NetworkDecider, job: Job, recovery: Recovery, drop_bound: float | None) -> NetworkSchedule:
    """All layers decided together, the cut network repaired."""
    repair = ReconstructionSettings() if job.settings.evaluation.compensate else None
    return NetworkSchedule(decide, repair, drop_bound, job.seed, recovery)


def _target(
    macs_removed: float | None,
    latency: float | None,
    milliseconds: float | None,
    params: float | None,
    bytes: int | None,
) -> Target | None:
    """What was asked for, all at once; None for nothing."""
    asked = (latency, milliseconds, params, bytes)
    return None if macs_removed is None and asked == (None,) * 4 else Target(macs_removed, "network", *asked)


def _asked(target: Target | None) -> dict[str, Any]:
    """What a folder remembers of the target; MACs alone as it always did."""
    facts = {} if target is None else target.facts()
    return {"macs_removed": facts.pop("removed", None)} | {name: value for name, value in facts.items() if name != "of"}


def _reader(
    agents: str | Path | SavedAgent | None,
    warm_start: str | Path | None,
    target: Target | None,
    settings: Settings | None,
) -> SavedAgent | None:
    """The agent that reads networks, if one is to decide; UserError where it cannot be used, or a search needs one."""
    if agents is None:
        where = None if target is None or settings is None else settings.network.reads
        if where is not None:
            load_pretrained(where)
        return None
    if warm_start is not None:
        raise UserError("agents decides without training, and warm_start trains agents further; leave one of them out.")
    if target is None:
        raise needs_target("macs_removed=0.5")
    return load_pretrained(agents)


def _warm(job: Job, run: str | Path | None, policies: Policies | None, target: Target | None) -> dict[str, SavedAgent]:
    """The agents to start from, of the layers that have one."""
    if run is None:
        return {}
    if target is not None:
        raise UserError("warm_start is for agents of layers, and a target trains one of all; leave one of them out.")
    names = [group.name for group in job.task.groups]
    common = agents_of(load_agents(run, policies), names, run, "warm_start")
    check_agents(common, job.task)
    return common


def _named(known: Mapping[str, SavedAgent]) -> dict[str, Any]:
    """What a folder remembers of the agents it began with; nothing where there are none."""
    modules: dict[str, Any] = {name: agent.policy for name, agent in known.items()}
    return {"agents": {name: hash_state(module) for name, module in modules.items()}} if known else {}
