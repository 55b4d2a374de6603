"""Fine-tuning by Lightning: `pip install 'keepdrop[lightning]'`."""

import keepdrop
import lightning
import torch
from quickstart import trained
from torch.utils.data import DataLoader, TensorDataset


class Classifier(lightning.LightningModule):
    """The module you already have, around whatever network it is given."""

    def __init__(self, network, lr=0.01):
        super().__init__()
        self.network, self.lr = network, lr

    def training_step(self, batch, _):
        """Cross-entropy of one batch."""
        images, labels = batch
        return torch.nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def fit(network, loader, epochs):
    """Train `network` in place; keepdrop takes it back afterwards."""
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(network), loader)


def main(updates=40, epochs=10):
    """Prune with Lightning in the place of keepdrop's fine-tuning."""
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
        finetune=lambda network: fit(network, loader, epochs=2),
        settings=keepdrop.Settings(agent=keepdrop.AgentSettings(updates=updates)),
    )
    print(result)
    return result


if __name__ == "__main__":
    main()
