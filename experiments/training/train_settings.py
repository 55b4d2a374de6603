"""How a network is trained: the numbers of one training, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...errors import UserError
from ...ranges import NOT_NEGATIVE, POSITIVE, check_numbers


@dataclass(frozen=True)
class TrainSettings:
    """How to train. Raises UserError for impossible values.

    Loss: (1 - distill_weight) * cross-entropy with `label_smoothing` + distill_weight * temperature^2 * KL(teacher ||
    network) at `temperature` (Hinton et al. 2015, arXiv 1503.02531, section 2). Images with another metric
    (`objective.Objective`) bring their own loss, and on floating targets the second part is the mean squared difference
    of the two outputs.

    Args:
        epochs: passes over the fit images, fractions allowed; 0 trains nothing.
        batch_size: images per step.
        lr: highest learning rate. None: `top_lr`, which fine-tuning and recovery lower where there are fewer than 5,000
            steps (by the root of their share) and by tenths to what the network bears; a training that ends no better
            is tried once more at a tenth. A base network is trained at `top_lr`, and where it ends guessing again at a
            tenth.
        momentum: of SGD, Nesterov's.
        weight_decay: spares biases and normalisation (parameters of one dimension).
        schedule: "cosine", "linear" or "constant", from `lr` down to `final_lr` times `lr`.
        warmup: fraction of all steps over which the rate rises linearly to `lr`.
        final_lr: last learning rate, as a fraction of `lr`.
        label_smoothing: in [0, 1]; of cross-entropy only.
        distill_weight: share of the teacher (the dense network) in the loss, in [0, 1].
        temperature: of the distillation.
        bf16: compute in bfloat16 where that is safe (autocast): 1.5 times faster on processors that have it, not
            bitwise equal to fp32.
        top_lr: highest learning rate where `lr` is None, of a training of 5,000 steps or more.
        auxiliary: weight of the loss of every further head of a network that answers with several in training mode
            (GoogLeNet, Inception, deep supervision).
        ema: decay of a moving average of the weights, such as 0.999: the average is what is judged and kept. It rises
            with the steps (`Average`), so a short training needs no other one. None: the weights themselves.
        devices: processes that share each step, one per GPU or, on a CPU, with a share of its cores each; more than one
            takes Lightning (`keepdrop[lightning]`). `batch_size` is still that of a step.
        graphs: on a GPU, whether a whole step is captured as a CUDA graph and replayed, without which a small network
            waits for the host; one that cannot be captured runs step by step, after a notice. Rounding differs.
        compile: whether network and teacher go through `torch.compile` first, half a minute to a minute each time.
            Slower than without on the processor it was measured on; meant for a GPU without graphs. Rounding differs.
            Not with several devices.
        sync_batch_norm: with several devices, whether batch normalisation takes the images of all of them together, as
            one device does; false: each its own share.
    """

    epochs: float = 5.0
    batch_size: int = 128
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    warmup: float = 0.1
    final_lr: float = 0.0
    label_smoothing: float = 0.0
    distill_weight: float = 0.0
    temperature: float = 4.0
    bf16: bool = False
    # Kept out of the text that identifies a training: with `lr` None it names the rate in use, as it always did.
    top_lr: float = field(default=0.05, repr=False)
    auxiliary: float = field(default=0.3, repr=False)
    ema: float | None = field(default=None, repr=False)
    devices: int = field(default=1, repr=False)
    sync_batch_norm: bool = field(default=False, repr=False)
    graphs: bool = field(default=True, repr=False)
    compile: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "linear", "constant"):
            raise UserError(f"schedule must be 'cosine', 'linear' or 'constant', got '{self.schedule}'.")
        lows = {"epochs": 0, "lr": 0, "top_lr": 0, "weight_decay": 0, "temperature": 1e-6, "batch_size": 2}
        for name, low in (lows | {"auxiliary": 0}).items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= low):
                raise UserError(f"{name} must be {low} or more, got {value}.")
        for name in ("momentum", "warmup", "final_lr", "label_smoothing", "distill_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} must lie in [0, 1], got {getattr(self, name)}.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise UserError(f"ema must lie in [0, 1), such as 0.999, or be left out, got {self.ema}.")
        check_numbers(self, epochs=(0, 1e6), batch_size=(2, 10**7), lr=NOT_NEGATIVE, top_lr=NOT_NEGATIVE)
        check_numbers(self, devices=(1, 4096))
        if self.batch_size % self.devices:
            raise UserError(
                f"batch_size is {self.batch_size}, which {self.devices} devices cannot share; expected a multiple of "
                f"{self.devices}."
            )
        check_numbers(self, weight_decay=NOT_NEGATIVE, temperature=POSITIVE, auxiliary=NOT_NEGATIVE)

    @property
    def rate(self) -> float:
        """The highest learning rate: `lr`, or `top_lr` where that is None."""
        return self.top_lr if self.lr is None else self.lr

    def lr_at(self, step: int, n_steps: int) -> float:
        """The learning rate of step 0..n_steps-1."""
        n_warmup = self.warmup * n_steps
        if step + 1 < n_warmup:
            return self.rate * (step + 1) / n_warmup
        progress = (step + 1 - n_warmup) / (n_steps + 1 - n_warmup)
        shape = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
        return self.rate * (self.final_lr + (1 - self.final_lr) * shape[self.schedule])
