"""Support for train.py: setup, checkpoints, the log, several processes, the optimizer."""
