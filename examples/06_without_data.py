"""No images at all: three ways, from none to minutes.

Nothing restored is what structured pruning leaves. Restoring on noise takes seconds; on images that are made from the
network itself, so that they have the statistics that its batch norms remember, it takes longer. For networks of
photographs such images keep more, the more so the further the network is cut; for digits of 8 by 8 pixels, as here,
noise keeps more.
"""

import time

import torch

import intrafusion
from intrafusion.lab import zoo

model = zoo.train_digits()  # a small residual network, trained here in a few seconds
test = zoo.load_data("digits_resnet", "test")


@torch.no_grad()
def accuracy(network: torch.nn.Module) -> float:
    return 100 * (network(test.images).argmax(1) == test.labels).float().mean().item()


print(f"original: {accuracy(model):.1f} %")
for restore in (None, "noise", "synthetic"):
    start = time.perf_counter()
    small = intrafusion.compress(model, test.images[:1], keep=0.7, restore=restore)
    seconds = time.perf_counter() - start
    print(f"restore={restore!r}: {accuracy(small.model):.1f} %, {small.after.params:,} parameters, {seconds:.0f} s")
