"""Old dotted names and settings in saved runs and pruned files: what they are called today, or that they are gone."""

from __future__ import annotations

from typing import Any

# Modules of version 0.1.0 whose names stand as `_target_` in a run's config.yaml or in architecture.json.
MODULES = {
    "keepdrop.agent.layer_matrix": "keepdrop.agent.policies.layer_matrix",
    "keepdrop.agent.policy": "keepdrop.agent.policies.set_policy",
    "keepdrop.envs.augment": "keepdrop.experiments.training.augment",
    "keepdrop.envs.data": "keepdrop.envs.data.sources",
    "keepdrop.envs.metrics": "keepdrop.envs.data.metrics",
    "keepdrop.envs.networks": "keepdrop.envs.networks.built_in",
}
SETTINGS = {"judge": "evaluation"}
# Settings of version 0.1.0 that no longer exist: dropped where a stored configuration is read, unknown when typed.
RETIRED = ("agent.control_variate", "search.adaptive")


def current_target(target: str) -> str:
    """The import path that `target` has today; any other name as it is."""
    module, _, name = target.rpartition(".")
    return f"{MODULES[module]}.{name}" if module in MODULES else target


def current_config(config: Any, top: bool = True) -> Any:
    """A stored configuration, plain containers, under today's names: `_target_` everywhere, settings at the top.

    Settings that were retired since are left out.
    """
    if top and isinstance(config, dict):
        config = _without_retired(config)
    if isinstance(config, dict):
        return {
            SETTINGS.get(key, key) if top else key: current_target(value)
            if key == "_target_" and isinstance(value, str)
            else current_config(value, top=False)
            for key, value in config.items()
        }
    return [current_config(each, top=False) for each in config] if isinstance(config, list) else config


def _without_retired(config: dict[str, Any]) -> dict[str, Any]:
    kept = dict(config)
    for section, _, key in (name.partition(".") for name in RETIRED):
        if isinstance(kept.get(section), dict):
            kept[section] = {name: value for name, value in kept[section].items() if name != key}
    return kept
