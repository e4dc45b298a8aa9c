"""Every message between processes, as msgspec structs: one file per channel.

requests.py  frontend ⇄ worker: work, its tokens, queries
events.py    worker → everybody: which blocks it holds, how loaded it is
cards.py     registry and worker → frontend: who is there, what the model is
kv.py        worker ⇄ worker: where blocks lie, under which lease

Messages are msgpack. Nothing on a wire is ever unpickled. A message that does not decode is a `WireError` and never reaches a plane.
"""
