"""Command-line tools: what a split would be, where its time goes, what a run has logged. The core imports none."""
