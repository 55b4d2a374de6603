"""Pruned networks on disk, as data and without pickle."""
