"""Command-line tools: plan a split, see where its time goes, report what a run has logged. The core imports none."""
