"""Networks: built-in CNNs, module kinds, wrappers, inputs and outputs, modes, graph rewrites, cost, checkpoints."""
