"""Continuous batching without a model: what every engine of our own does around a step, whatever computes the step.

In come `Submit`s, out go step plans, and from their outcomes `StepReport`s. `scheduler` decides which tokens are computed, from counts
alone; `core` keeps the books around a step; `stepping` drives it on an event loop. The torch engine computes the plans with a
model, the mock engine with a clock; neither has a second version of anything here. Nothing here imports torch.
"""
