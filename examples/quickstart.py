"""Ten lines from a trained network and two datasets to a smaller network; half a minute."""

import keepdrop
from keepdrop.envs.data.sources import digits
from keepdrop.envs.networks.built_in import small_cnn
from keepdrop.experiments.training.loop import fit_network


def trained(data, epochs=10):
    """Stands for the network you have: a small CNN trained on scikit-learn's digits."""
    model = small_cnn()
    fit_network(model, data.train, keepdrop.TrainSettings(epochs=epochs, batch_size=64, lr=0.1), seed=0)
    return model


def main(updates=40, epochs=10):
    """Prune, print what it did, save, and load again."""
    data = digits()
    model = trained(data, epochs)
    result = keepdrop.prune(
        model,
        data.train,  # any torch Dataset of (image, label), or a pair of tensors (images, labels)
        data.test,
        drop_bound=0.02,
        layers=["conv1", "conv2"],  # all that can be pruned, if left out
        settings=keepdrop.Settings(agent=keepdrop.AgentSettings(updates=updates)),
        progress=lambda step: print(step) if step.stage == "layer" else None,
    )
    print(result)
    return result


if __name__ == "__main__":
    main().save("small")
    print(keepdrop.load_pruned("small", small_cnn))
