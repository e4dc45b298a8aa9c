"""Chaos: a real cluster under load while processes are killed and stopped, roles flipped, connections cut, blocks
damaged, disks filled; on a seed, at random times and at chosen moments.

    cases    what is asked, and how answers compare with those of a fault-free run
    load     clients that ask all the time
    faults   what is done to the cluster meanwhile (disks, pools, outages: parts of it)
    checks   what must be true when all is over
    run      puts them together; `python -m tests.chaos` is the long form, `tests/e2e/test_chaos.py` the short one

The checkers do not look into the code under test: they see HTTP answers, the registry, the workers' status, processes and files, and a
ledger of what workers were asked and told (`polyphase.testing.ledger`), which is planted into them as the means of some faults are.
"""
