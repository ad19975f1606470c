"""One file for each file of ours; conftest.py has what they share."""
