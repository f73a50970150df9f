"""Networks and data sets that benchmarks, examples and the demo run on."""

from intrafusion.lab.zoo.cifar import fetch_cifar, load_cifar
from intrafusion.lab.zoo.data import load_data
from intrafusion.lab.zoo.downloading import download
from intrafusion.lab.zoo.folder import ImageFolder, open_folder
from intrafusion.lab.zoo.images import Images, Normalisation
from intrafusion.lab.zoo.registry import Entry, build, entry, example_input, names
from intrafusion.lab.zoo.train import train_digits

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
    "train_digits",
]
