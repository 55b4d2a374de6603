"""What a run leaves behind and shows: its folder, provenance, seeds, terminal, TensorBoard."""
