"""Every method at equal MACs: plan, choices, measuring, tables."""
