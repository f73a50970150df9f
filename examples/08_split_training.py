"""Two networks trained on halves of the data, fused, compressed, fine-tuned: "fap" of Theus et al. 2024, section 6."""

from dataclasses import replace

import torch
from sklearn.datasets import load_digits
from torch import nn

from intrafusion.lab.experiments.split import PAPER, SplitTraining, split_train
from intrafusion.lab.zoo import Images

pixels, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
data, validation = Images(images[:1200], labels[:1200]), Images(images[1200:], labels[1200:])


def make_network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


short = replace(PAPER, epochs=4, lr=0.1, batch_size=32)  # the paper trains for 300
result = split_train(
    make_network, images[:1], data, validation, SplitTraining("fap", keep=0.5, train=short, tune=short)
)
for phase in result.phases:
    measured = "" if phase.validation is None else f", {100 * phase.validation:.1f} % on validation images"
    print(f"{phase.name}: {phase.members} network(s), {phase.work_s:.1f} s of work{measured}")
print(result.compressed)
