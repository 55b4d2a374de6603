"""Registers the environments with Gymnasium when it is imported.

Gymnasium 1.0 dropped the plugins of earlier versions, so an id is known once this module has been imported, which
`gymnasium.make("keepdrop.envs.registration:keepdrop/FilterPruning-v0", ...)` does by itself.
"""

import gymnasium

FILTER_PRUNING = "keepdrop/FilterPruning-v0"


def register_envs() -> None:
    """Register `keepdrop/FilterPruning-v0`; once is enough, and done by importing this module."""
    if FILTER_PRUNING not in gymnasium.registry:
        gymnasium.register(
            id=FILTER_PRUNING,
            entry_point="keepdrop.envs.filter_pruning:make_env",
            vector_entry_point="keepdrop.envs.filter_pruning:make_vector_env",
        )


register_envs()
