"""What happens to batches whose loss, activations or gradients are NaN or infinite."""
