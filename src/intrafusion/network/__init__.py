"""What everybody needs of a network: calls and their inputs, tensors, copies, preserved state, layers."""
