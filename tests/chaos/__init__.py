"""Chaos: a real cluster under load while processes are killed and stopped, roles flipped, connections cut, disks filled; all on a seed.

    cases   what is asked, and the answers of a fault-free run
    load    clients that ask, and compare each answer with that of the fault-free run
    faults  what is done to the cluster meanwhile
    checks  what must be true when all is over
    run     puts them together; `python -m tests.chaos` is the long form, `tests/e2e/test_chaos.py` the short one

Nothing here looks into the code under test: it sees HTTP answers, the registry, the workers' status, processes and files.
"""
