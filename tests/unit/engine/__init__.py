"""Tests of the torch engine, on tiny models with random weights."""
