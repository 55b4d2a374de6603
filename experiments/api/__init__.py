"""The Python interface: `keepdrop.prune` and what it takes and returns."""
