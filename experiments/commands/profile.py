"""`keepdrop profile`: what pruned copies of a network take on this device, and how well that foretells other copies."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ...envs.data.packing import packed_batch
from ...envs.networks.inputs import mapped
from ...envs.surgery.latency_meter import LatencyFit
from ...envs.surgery.latency_profile import LatencyProfile, TimeTable
from ..config.build import NetworkConstructor, load_network
from ..config.entry_point import plain, run_with_hydra
from ..config.ignored import refuse_ignored
from ..deploy.profiling import ProfileSettings, profile_network, warn_of_doubts
from ..pruning.input_checks import resolve_device
from ..runs.console import Terminal
from .inspect import IGNORED, example_of

SETTINGS = tuple(each.name for each in fields(ProfileSettings))


def main() -> None:
    """Entry point of the command."""
    run_with_hydra("profile", run)


def run(config: DictConfig) -> LatencyProfile:
    """Measure, write the profile, and show it with its error."""
    refuse_ignored(config, IGNORED)
    device = resolve_device(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    settings = ProfileSettings(**{name: plain(config[name]) for name in SETTINGS})
    example = example_of(config)
    images, packing = (example, None) if isinstance(example, torch.Tensor) else packed_batch(example)
    construct = NetworkConstructor(config.network, config.seed, images, packing)
    model = load_network(construct, config.checkpoint).to(device)
    terminal = Terminal(config.quiet)
    try:
        found = profile_network(
            model,
            mapped(images, lambda value: value.to(device)),
            settings,
            layers=plain(config.layers),
            path=config.out,
            watcher=terminal,
        )
    except KeyboardInterrupt as stop:
        kept = Path(config.out).exists()
        raise type(stop)(
            f"The same command measures the rest: {config.out} has what is done." if kept else ""
        ) from None
    show(found, config.out, terminal)
    warn_of_doubts(found)
    return found


def show(profile: LatencyProfile, path: str, terminal: Terminal) -> None:
    """One row per runtime and batch size, and of the first the layers that take most."""
    terminal.profile(str(profile.conditions), [row(profile, table) for table in profile.tables])
    terminal.say(f"written: {path}")


def row(profile: LatencyProfile, table: TimeTable) -> dict[str, Any]:
    """What a person wants to know of one table; times in seconds, errors as fractions."""
    fit = LatencyFit(profile, table.samples)
    errors = sorted(map(abs, fit.errors(table.checks)))
    dense = [n for _, n in profile.groups]
    parts = fit.layer_fractions(dense)
    return {
        "runtime": table.runtime,
        "batch_size": table.batch_size,
        "seconds": table.dense_seconds,
        "spread": table.dense_spread,
        "error": errors[len(errors) // 2] if errors else None,
        "worst": errors[-1] if errors else None,
        "copies": len(table.samples),
        "layers": {name: part for name, part in sorted(parts.items(), key=lambda each: -each[1])[:3]},
    }
