"""Hydra: schemas, objects built from a configuration, entry points, and mistakes explained."""
