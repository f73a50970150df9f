"""intrafusion: make a trained neural network smaller without retraining it, and prove each step."""
