"""Supports checkpoint.py: files from outside, the keys of config.json, weight files."""
