"""Networks: module kinds, wrappers, inputs and outputs, modes, graph rewrites, cost, checkpoints, built-in CNNs."""
