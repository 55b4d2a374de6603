"""A detector of your own, pruned: boxes as targets, mean average precision as the metric, your loss and your loop."""

import keepdrop
import torch
from keepdrop.envs.data.average_precision import box_iou
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

SIZE, KINDS = 64, ("square", "disc", "triangle")


class Shapes(Dataset):
    """Noisy images (3, 64, 64) of one to three coloured shapes, as a detection data set gives them.

    An item is (image, {"boxes": (n, 4) as x1, y1, x2, y2 in pixels, "labels": (n,)}), with as many boxes as it has.
    """

    def __init__(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        self.items = [self.draw(generator) for _ in range(count)]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]

    def draw(self, generator):
        """One item."""

        def number(low, high):
            return int(torch.randint(low, high, (), generator=generator))

        image = 0.25 * torch.randn(3, SIZE, SIZE, generator=generator)
        boxes, labels = [], []
        for _ in range(number(1, 4)):
            side, kind = number(10, 33), number(0, len(KINDS))
            x, y = number(0, SIZE - side), number(0, SIZE - side)
            box = torch.tensor([[x, y, x + side, y + side]], dtype=torch.float32)
            if boxes and float(box_iou(box, torch.cat(boxes)).max()) > 0.1:
                continue
            colour = (0.5 + torch.rand(3, 1, 1, generator=generator)) * (1 if number(0, 2) else -1)
            image[:, y : y + side, x : x + side] += colour * stencil(KINDS[kind], side)
            boxes.append(box)
            labels.append(kind)
        return image, {"boxes": torch.cat(boxes), "labels": torch.tensor(labels)}


def stencil(kind, side):
    """1 inside of a shape, 0 outside: (side, side)."""
    y, x = torch.meshgrid(*[(torch.arange(side) + 0.5) / side] * 2, indexing="ij")
    inside = {"square": x >= 0, "disc": (x - 0.5) ** 2 + (y - 0.5) ** 2 <= 0.25, "triangle": (x - 0.5).abs() <= y / 2}
    return inside[kind].float()


def block(fan_in, width, stride=1):
    """Convolution, batch normalisation, ReLU."""
    conv = nn.Conv2d(fan_in, width, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


class Detector(nn.Module):
    """Backbone, neck and a head on two scales: images (B, 3, H, W) -> (B, cells, 4 + kinds), of all cells of both.

    A cell answers with the logarithms of its box's left, top, right and bottom in strides, then a logit per kind.
    """

    strides = (8, 16)

    def __init__(self, widths=(16, 32, 48, 64), neck=48):
        super().__init__()
        self.stem = nn.Sequential(block(3, widths[0], 2), block(widths[0], widths[1], 2))
        self.stage3 = nn.Sequential(block(widths[1], widths[2], 2), block(widths[2], widths[2]))
        self.stage4 = nn.Sequential(block(widths[2], widths[3], 2), block(widths[3], widths[3]))
        self.lateral3, self.lateral4 = nn.Conv2d(widths[2], neck, 1), nn.Conv2d(widths[3], neck, 1)
        self.head3, self.head4 = self.head(neck), self.head(neck)

    def head(self, width):
        """What each scale ends in."""
        return nn.Sequential(block(width, width), nn.Conv2d(width, 4 + len(KINDS), 1))

    def forward(self, images):
        """See the class."""
        fine = self.stage3(self.stem(images))
        coarse = self.lateral4(self.stage4(fine))
        fine = self.lateral3(fine) + functional.interpolate(coarse, scale_factor=2)
        maps = self.head3(fine), self.head4(coarse)
        return torch.cat([each.flatten(2).transpose(1, 2) for each in maps], 1)


def cells(device):
    """Centres (cells, 2) and strides (cells, 1) of all cells, in pixels."""
    centres, strides = [], []
    for stride in Detector.strides:
        steps = (torch.arange(SIZE // stride, device=device) + 0.5) * stride
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        centres.append(torch.stack([x, y], -1).reshape(-1, 2))
        strides.append(torch.full((len(centres[-1]), 1), float(stride), device=device))
    return torch.cat(centres), torch.cat(strides)


def boxes_in(outputs):
    """The box of every cell, (B, cells, 4)."""
    centres, strides = cells(outputs.device)
    sides = outputs[..., :4].clamp(max=4).exp() * strides
    return torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], -1)


def loss(outputs, targets):
    """Focal loss of the kinds, overlap and distance of the boxes: outputs (B, cells, 4 + kinds), boxes (B, most, 5).

    A box is a row of x1, y1, x2, y2, label; rows of label -1 fill up. It belongs to the cells around its middle, small
    ones to those of the finer scale.
    """
    centres, strides = cells(outputs.device)
    middle, sides = (targets[..., :2] + targets[..., 2:4]) / 2, targets[..., 2:4] - targets[..., :2]
    near = ((centres[:, None] - middle[:, None]).abs() < 0.75 * strides[:, None]).all(-1)  # (B, cells, most)
    near &= (strides == torch.tensor(Detector.strides)[(sides.amax(-1) >= 22).long()][:, None]) & (
        targets[:, None, :, 4] >= 0
    )
    image, cell = near.any(2).nonzero(as_tuple=True)
    wanted = targets[image, near[image, cell].float().argmax(1)]
    kinds, truth = outputs[..., 4:], torch.zeros_like(outputs[..., 4:])
    truth[image, cell, wanted[:, 4].long()] = 1
    focal = functional.binary_cross_entropy_with_logits(kinds, truth, reduction="none") * (truth - kinds.sigmoid()) ** 2
    overlap = box_iou(boxes_in(outputs)[image, cell][:, None], wanted[:, None, :4]).sum()
    exact = torch.cat([centres[cell] - wanted[:, :2], wanted[:, 2:4] - centres[cell]], 1) / strides[cell]
    apart = (outputs[image, cell, :4] - exact.clamp_min(0.1).log()).abs().sum()
    return (focal.sum() + len(cell) - overlap + 0.25 * apart) / max(1, len(cell))


@torch.no_grad()
def decode(outputs, most=20, overlap=0.5):
    """Detections (B, most, 6): x1, y1, x2, y2, score, label; doubles of a better one have a score of -1."""
    scores, labels = outputs[..., 4:].sigmoid().max(-1)
    scores, best = scores.topk(min(most, scores.shape[1]))
    boxes = boxes_in(outputs).gather(1, best[..., None].expand(-1, -1, 4))
    labels = labels.gather(1, best)
    doubles = (box_iou(boxes, boxes) > overlap) & (labels[:, None] == labels[..., None])
    kept = torch.ones_like(scores, dtype=torch.bool)
    for rank in range(1, scores.shape[1]):
        kept[:, rank] = ~(doubles[:, rank, :rank] & kept[:, :rank]).any(1)
    return torch.cat([boxes, torch.where(kept, scores, -1.0)[..., None], labels[..., None]], -1)


def collate(items):
    """What the loop's loader makes of items: images (B, 3, H, W), boxes (B, most, 5)."""
    images, targets = zip(*items, strict=True)
    rows = [torch.cat([each["boxes"], each["labels"][:, None]], 1) for each in targets]
    return torch.stack(images), nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def fit(model, data, epochs, lr):
    """The loop you already have; trains `model` in place."""
    loader = DataLoader(data, batch_size=32, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(2, epochs * len(loader)))
    model.train()
    for _ in range(epochs):
        for images, targets in loader:
            value = loss(model(images), targets)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()


def data(images=800):
    """Training and test images, for the command line."""
    return Shapes(images, seed=0), Shapes(images // 2, seed=1)


def main(images=800, epochs=25, updates=20, tuning=10, layers=None, folder="detector"):
    """Train a detector, prune its backbone and neck, train the small one in the same loop, and load it again."""
    torch.manual_seed(0)
    (train, test), model = data(images), Detector()
    fit(model, train, epochs, lr=1e-2)
    torch.save(model.state_dict(), f"{folder}.pt")
    result = keepdrop.prune(
        model,
        train,
        test,
        drop_bound=0.1,
        layers=layers,
        finetune=lambda network: fit(network, train, tuning, lr=3e-3),
        settings=keepdrop.Settings(
            metric=keepdrop.MeanAveragePrecision(decode, iou=0.5),
            loss=loss,
            agent=keepdrop.AgentSettings(updates=updates),
        ),
    )
    print(result)
    for name, value in (("dense", result.base_accuracy), ("cut", result.pruned_accuracy), ("tuned", result.accuracy)):
        print(f"mAP at 0.5, {name}: {value:.3f}")
    result.save(folder)
    return result, keepdrop.load_pruned(folder, Detector)


if __name__ == "__main__":
    main()
