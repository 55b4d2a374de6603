"""Your own training loop, between the layers and at the end: plain PyTorch."""

import keepdrop
import torch
from quickstart import trained
from torch.utils.data import DataLoader, TensorDataset


def fine_tune(model, loader, epochs=1, lr=0.01):
    """The loop you already have; it trains the network it is given in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(epochs):
        for images, labels in loader:
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main(updates=40, epochs=10):
    """Prune with `fine_tune` in the place of keepdrop's training."""
    from keepdrop.envs.data.sources import digits

    data = digits()
    model = trained(data, epochs)
    train, test = (TensorDataset(*images.batch(torch.arange(len(images)))) for images in (data.train, data.test))
    loader = DataLoader(train, batch_size=64, shuffle=True)
    result = keepdrop.prune(
        model,
        train,
        test,
        layers=["conv1", "conv2"],
        recover=lambda network: fine_tune(network, loader),
        finetune=lambda network: fine_tune(network, loader, epochs=2),
        settings=keepdrop.Settings(agent=keepdrop.AgentSettings(updates=updates)),
    )
    print(result)
    return result


if __name__ == "__main__":
    main()
