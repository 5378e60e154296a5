"""What happens to the tensors that reach a boundary."""
