"""What a network does with the channels of its groups."""
