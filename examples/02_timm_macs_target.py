"""A network of timm, to 60 % of its multiply-accumulates, sizes in multiples of 8.

Random weights, so that nothing is downloaded; pass pretrained=True and real images for a network that is of use.
Where to cut is chosen for the least error, layer by layer.
"""

import timm
import torch

import intrafusion

torch.manual_seed(0)
model = timm.create_model("resnet10t", pretrained=False, num_classes=10).eval()
example = torch.randn(1, 3, 32, 32)
images = torch.randn(64, 3, 32, 32)  # in your case: what the network was made for

small = intrafusion.compress(model, example, target={"macs": 0.6}, inputs=images, round_to=8)
print(small)

assert small.after.macs < 0.61 * small.before.macs  # the nearest that these sizes allow
assert all(decision.m % 8 == 0 for decision in small.plan.decisions if decision.reduced)
