"""Pretraining: one agent trained over many networks and targets, so that it can be asked about any other network."""
