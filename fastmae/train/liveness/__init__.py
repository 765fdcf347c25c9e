"""Signals, time limits, and processes that stand still or are gone: what all have to agree on or be told."""
