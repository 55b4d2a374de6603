"""Networks: kinds of modules, inputs, modes, graph rewrites, cost, checkpoints, the built-in CNNs."""
