"""Model -> ChannelGraph: which channels belong together, found from one forward pass."""

from intrafusion.trace.call import Call
from intrafusion.trace.info import LabelledTensor, Weight
from intrafusion.trace.ledger import Ledger
from intrafusion.trace.rules import Rule, refuse, register_rule
from intrafusion.trace.run import trace

__all__ = ["Call", "LabelledTensor", "Ledger", "Rule", "Weight", "refuse", "register_rule", "trace"]
