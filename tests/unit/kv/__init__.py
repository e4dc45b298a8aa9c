"""Tests of the deciding code about KV blocks."""
