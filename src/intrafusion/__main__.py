"""python -m intrafusion"""

from intrafusion.cli.main import app

app()
