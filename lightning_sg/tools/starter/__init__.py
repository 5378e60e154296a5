"""Writes a small model, a script and a configuration to start from: ``lightning-sg init``."""
