"""Model -> ChannelGraph: which channels belong together, found from one forward pass."""

from intrafusion.trace.tracer import trace

__all__ = ["trace"]
