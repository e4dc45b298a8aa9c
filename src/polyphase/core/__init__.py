"""The words of the system: identities, errors, clocks, block hashing.

Nothing here knows of a process, a socket, a model or a policy; every other plane may import it and it imports none of them.
"""
