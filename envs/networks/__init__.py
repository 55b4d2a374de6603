"""What a network is: kinds of modules, inputs, modes, tracing, cost, checkpoints, the built-in CNNs."""
