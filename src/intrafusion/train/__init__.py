"""Training: one loop, what of a network is trained, what for, and under which masks."""

from intrafusion.train.adapters import KINDS, adapt
from intrafusion.train.blocks import merges_of, reconstruct_
from intrafusion.train.loop import train_
from intrafusion.train.masks import apply_masks_, load_masks, masks_of, save_masks
from intrafusion.train.objectives import Block, Distillation, Labels, Objective
from intrafusion.train.training import Epoch, History, Labelled, Training

__all__ = [
    "KINDS",
    "Block",
    "Distillation",
    "Epoch",
    "History",
    "Labelled",
    "Labels",
    "Objective",
    "Training",
    "adapt",
    "apply_masks_",
    "load_masks",
    "masks_of",
    "merges_of",
    "reconstruct_",
    "save_masks",
    "train_",
]
