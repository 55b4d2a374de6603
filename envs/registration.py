"""Registers the environments with Gymnasium. Light on purpose: Gymnasium loads it whenever it is imported."""

import gymnasium


def register_envs() -> None:
    """Register `keepdrop/FilterPruning-v0`; called by Gymnasium through the `gymnasium.envs` entry point."""
    gymnasium.register(
        id="FilterPruning-v0",
        entry_point="keepdrop.envs.filter_pruning:make_env",
        vector_entry_point="keepdrop.envs.filter_pruning:make_vector_env",
    )
