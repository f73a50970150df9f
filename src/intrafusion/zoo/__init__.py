"""Networks, data sets and the training loop that benchmarks, examples and the demo run on."""

from intrafusion.zoo.cifar import fetch_cifar, load_cifar
from intrafusion.zoo.data import load_data
from intrafusion.zoo.download import download
from intrafusion.zoo.folder import ImageFolder, open_folder
from intrafusion.zoo.images import Images, Normalisation
from intrafusion.zoo.registry import Entry, build, entry, example_input, names
from intrafusion.zoo.train import train_, trained_digits

__all__ = [
    "Entry",
    "ImageFolder",
    "Images",
    "Normalisation",
    "build",
    "download",
    "entry",
    "example_input",
    "fetch_cifar",
    "load_cifar",
    "load_data",
    "names",
    "open_folder",
    "train_",
    "trained_digits",
]
