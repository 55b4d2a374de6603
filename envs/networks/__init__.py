"""Networks: kinds of modules, wrappers, inputs and outputs, modes, graph rewrites, cost, checkpoints, the built-in CNNs."""
