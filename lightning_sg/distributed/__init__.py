"""A run whose stages are on several processes."""
