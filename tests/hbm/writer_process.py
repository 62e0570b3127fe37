"""Not a test: a writer that fills slots with bytes that tell request and token, in an arena that it makes grow and
shrink, until it is killed.

Arguments: socket, fencing token. Prints first how many committed tokens of its predecessor were wrong and how many there were,
then a dot for each step.
"""

from __future__ import annotations

import random
import sys
import zlib

from flexpert.hbm import GRANULE_BYTES, ArenaOp, Claim, HbmClient, Map, Unmap

TOKEN_BYTES = 1024
SLOTS, SLOT_GRANULES, GRANULES = 6, 4, 20
PER_GRANULE = GRANULE_BYTES // TOKEN_BYTES


def content(request_id: str, token: int) -> bytes:
    return bytes([zlib.crc32(f"{request_id}/{token}".encode()) & 255]) * TOKEN_BYTES


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


socket_path, incarnation = sys.argv[1], int(sys.argv[2])
chance = random.Random(incarnation)
client = HbmClient.connect(socket_path, client_name="writer", fencing_token=incarnation)
size = GRANULES if incarnation == 1 else None
arena = client.open_kv_arena("kv", slots=SLOTS, slot_bytes=SLOT_GRANULES * GRANULE_BYTES, granules=size)
memory = arena.memory()
wrong = total = 0
for record in arena.records():
    for token in range(record.committed if record.request_id else 0):
        begin = record.slot * arena.slot_bytes + token * TOKEN_BYTES
        total += 1
        wrong += memory[begin : begin + TOKEN_BYTES] != content(record.request_id, token)
say(f"{wrong} {total}\n")

arena.reset()
free = set(arena.granules)
requests: dict[int, tuple[str, list[int], int]] = {}  # slot -> request id, granules, tokens written
for step in range(1_000_000):
    slot = chance.randrange(SLOTS)
    if len(arena.granules) < 2 * GRANULES and chance.random() < 0.2:
        free.update(arena.grow(chance.randrange(1, 5)))
    if len(arena.granules) > GRANULES // 2 and free and chance.random() < 0.2:
        given = chance.sample(sorted(free), chance.randrange(1, min(len(free), 5) + 1))
        arena.shrink(given)
        free.difference_update(given)
    ops: list[ArenaOp] = []
    if slot not in requests or chance.random() < 0.1:
        free.update(requests[slot][1] if slot in requests else ())
        requests[slot] = (f"{incarnation}-{step}", [], 0)
        ops += [Claim(slot, requests[slot][0]), Unmap(slot)]
    request_id, granules, written = requests[slot]
    end = min(
        written + chance.randrange(1, 200), (len(granules) + len(free)) * PER_GRANULE, SLOT_GRANULES * PER_GRANULE
    )
    new = tuple(chance.sample(sorted(free), -(-end // PER_GRANULE) - len(granules)))
    free.difference_update(new)
    if new:
        ops.append(Map(slot, len(granules), new))
    arena.apply(ops)
    for token in range(written, end):
        begin = slot * arena.slot_bytes + token * TOKEN_BYTES
        memory[begin : begin + TOKEN_BYTES] = content(request_id, token)
    arena.committed[slot] = end
    requests[slot] = (request_id, [*granules, *new], end)
    say(".")
