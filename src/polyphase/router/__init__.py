"""Decides which worker runs which phase of a request, from what is cached where and what is booked on whom.

In come worker facts, KV events, load reports and route requests; out go routes with their reasons. It touches no clock, randomness,
socket or task: the frontend feeds it and acts on what it says.
"""
