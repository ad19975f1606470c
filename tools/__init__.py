"""Programs around the four: evaluate.py (how good), accuracy.py (how often right), bench.py (how fast)."""
