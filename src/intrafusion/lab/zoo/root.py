"""Where data and trained weights lie: the folder named by the environment variable INTRAFUSION_DATA."""

from __future__ import annotations

import os
from pathlib import Path

from intrafusion.arguments import expand_home
from intrafusion.errors import FolderError

_VARIABLE = "INTRAFUSION_DATA"


def data_file(*parts: str) -> Path:
    """Path of a file below `$INTRAFUSION_DATA`.

    Raises:
        FolderError: the variable is unset, or the file is missing.
    """
    wanted = Path(*parts)
    root = os.environ.get(_VARIABLE)
    if not root:
        raise FolderError(f"{wanted} is needed, but {_VARIABLE} is not set; set it to the folder that holds {wanted}.")
    path = Path(expand_home(root)) / wanted
    if not path.is_file():
        raise FolderError(f"{_VARIABLE}={root}: expected the file {wanted} there, found none; put it there.")
    return path
