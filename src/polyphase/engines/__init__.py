"""Adapters to inference engines, one folder each, behind the contract in `interface.py`.

In come `Submit`s with token ids, out go `StepReport`s with tokens and KV events. An engine knows nothing of sockets to frontends, of HTTP,
text templates or other workers; blocks of another worker reach it as a `BlockSource` that somebody else has opened.
"""
