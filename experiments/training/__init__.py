"""Training a network: settings, augmentation, the loop, its snapshots."""
