"""What everybody needs of a network."""
