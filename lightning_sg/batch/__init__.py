"""What can be read from a batch: labels, features, a fingerprint; sequences in chunks."""
