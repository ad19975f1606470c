"""Programs around the four: evaluate.py (how good), bench.py (how fast), ensemble.py (more from few labels)."""
