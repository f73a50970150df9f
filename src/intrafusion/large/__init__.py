"""Networks larger than memory: a folder of sharded weights made smaller block by block."""

from intrafusion.large.folder import BlockReport, CompressedFolder, compress_folder

__all__ = ["BlockReport", "CompressedFolder", "compress_folder"]
