"""The same as index.py, done by Dynamo's RadixTree and hashing through its Python bindings. Run by index.py in Dynamo's environment.

Its tree takes an event as JSON bytes, so decoding is part of what is timed there; the events are made before. A lookup ends with the
scores as a Python dict, as its users need them. CPU time of the whole process, because the tree lives in a thread of its own.
"""

import json
import random
import statistics
import sys
import time

from dynamo.llm import RadixTree, compute_block_hash_for_seq

CHAIN_BLOCKS = 1000
EVENT_BLOCKS = 32
LOOKUPS = 40


def cpu_us(call, times=1):
    began = time.process_time_ns()
    for _ in range(times):
        call()
    return max((time.process_time_ns() - began) / times / 1e3 - EMPTY_US / times, 0.0)


EMPTY_US = 0.0
EMPTY_US = statistics.median(cpu_us(lambda: None) for _ in range(2001))


def chain(rng, block_count):
    return [rng.getrandbits(64) for _ in range(block_count)]


def stored(event_id, hashes, start, end):
    blocks = [{"block_hash": one, "tokens_hash": one} for one in hashes[start:end]]
    parent = hashes[start - 1] if start else None
    return json.dumps({"event_id": event_id, "data": {"stored": {"parent_hash": parent, "blocks": blocks}}, "dp_rank": 0}).encode()


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def measure(worker_count, block_count, rounds):
    rng = random.Random(worker_count)
    rates, lookups, weight = [], {1024: [], 128: []}, 0.0
    for _ in range(rounds):
        chains = [chain(rng, CHAIN_BLOCKS) for _ in range(block_count // CHAIN_BLOCKS)]
        events = [
            (number % worker_count, stored(start, hashes, start, min(start + EVENT_BLOCKS, CHAIN_BLOCKS)))
            for number, hashes in enumerate(chains)
            for start in range(0, CHAIN_BLOCKS, EVENT_BLOCKS)
        ]
        tree = RadixTree()
        before = resident_bytes()

        def apply(tree=tree, events=events, last=chains[-1]):
            for worker, event in events:
                tree.apply_event(worker, event)
            tree.find_matches(last[:1])  # when this answers, all is applied

        rates.append(block_count / cpu_us(apply))
        weight = max(weight, (resident_bytes() - before) / block_count)
        hot = chain(rng, 1024)
        for worker in range(worker_count):
            tree.apply_event(worker, stored(10**6, hot, 0, 1024 - worker * 900 // worker_count))
        for length, found in lookups.items():
            total = 0.0
            for _ in range(LOOKUPS // 2):
                cold = (rng.choice(chains) + chain(rng, length))[:length]
                for prompt in (cold, hot[:length]):
                    sum(prompt)
                    total += cpu_us(lambda tree=tree, prompt=prompt: tree.find_matches(prompt).scores)
            found.append(total / LOOKUPS)
    return statistics.median(rates), {length: statistics.median(found) for length, found in lookups.items()}, weight


def main():
    block_count, rounds = int(sys.argv[1]), int(sys.argv[2])
    rng = random.Random(1)
    tokens = [rng.randrange(150_000) for _ in range(4096)]
    figures = {"hash": statistics.median(4096 / cpu_us(lambda: compute_block_hash_for_seq(tokens, 16), 50) for _ in range(3 * rounds))}
    applied, weights = [], []
    for worker_count in (8, 64, 512):
        rate, lookups, weight = measure(worker_count, block_count, rounds)
        applied.append(rate)
        weights.append(weight)
        figures[f"lookup_1024_w{worker_count}"] = lookups[1024]
        figures[f"lookup_128_w{worker_count}"] = lookups[128]
    figures["apply"] = max(applied)
    figures["bytes"] = weights[0]  # later trees reuse what earlier ones gave back
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
