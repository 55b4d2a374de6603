"""A command's configuration as the functions shared with `keepdrop prune` know it."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from .schema import PruneConfig, structured


def as_prune(config: DictConfig, *own: str) -> DictConfig:
    """The configuration with what `keepdrop prune` has besides at its defaults, and so its keys `own`."""
    known = structured(PruneConfig)
    shared = [key for key in known if key in config and key not in own]
    merged = OmegaConf.merge(known, {key: config[key] for key in shared})
    assert isinstance(merged, DictConfig)
    return merged
