"""Hosts one engine as a process: `python -m polyphase.worker`.

In come `Submit`s and the other messages of the request channel; out go tokens, one message per step and peer, and the event stream. The
worker moves messages between peers and the engine, opens other workers' block pools for it, and tells the registry that it is there. It
decides nothing about scheduling or routing, and never speaks HTTP.
"""
