"""The loops of `few_picks`: depth-first search for a cover of at most k candidates, on words of 62 bits.

62, not 64: signed integers that never overflow, so the compiled loops and plain Python compute the same.
"""

from __future__ import annotations

from typing import Any

from topoprune_solvers.compiled import kernel

__all__ = ["BITS", "FOUND", "NOTHING", "OUT_OF_NODES", "picks_kernel", "popcount"]

BITS = 62
OUT_OF_NODES, NOTHING, FOUND = 0, 1, 2


@kernel
def popcount(x: Any) -> Any:
    """Return the number of set bits of 0 <= x < 2^62."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return (x + (x >> 32)) & 0x7F


@kernel
def picks_kernel(
    col: Any, row: Any, c: Any, e: Any, k: Any, bare: Any, free: Any, child: Any, count: Any, place: Any, pick: Any,
    gain: Any, tally: Any, state: Any, limit: Any,
) -> Any:  # fmt: skip
    """Search on from where the last call stopped.

    Args:
        col: (words of elements * c) bit sets of elements, word by word. row: (e * words of candidates) bit sets.
        c, e: numbers of candidates and elements. k: most picks, >= 1.
        bare: (k + 1, words of elements) uncovered elements a level. free: (k + 1, words of candidates) candidates
            still allowed a level. child: (k, c) candidates to try a level, count: (k,) how many, place: (k,) the
            next one, -1 for a level just entered. All flat.
        pick: (k,) the answer. gain: (c,), tally: (e + 1,) working space, tally all 0.
        state: level and nodes so far. limit: nodes at which to stop.

    Returns:
        OUT_OF_NODES, NOTHING (there is no such cover) or FOUND (`pick` up to -1).
    """
    words, slots = (e + BITS - 1) // BITS, (c + BITS - 1) // BITS
    level = state[0]
    while level >= 0:
        here, allowed = level * words, level * slots
        left_picks = k - level
        if place[level] < 0:
            if state[1] >= limit:
                state[0] = level
                return OUT_OF_NODES
            state[1] += 1
            place[level] = 0
            count[level] = 0
            left = 0
            for j in range(c):
                gain[j] = 0
            for w in range(words):
                uncovered = bare[here + w]
                if uncovered:
                    left += popcount(uncovered)
                    base = w * c
                    for j in range(c):
                        gain[j] += popcount(col[base + j] & uncovered)
            # What the best picks could cover at most, counted by size.
            for j in range(c):
                if free[allowed + j // BITS] >> (j % BITS) & 1:
                    tally[gain[j]] += 1
            most, others, wanted = 0, 0, left_picks
            for size in range(left, 0, -1):
                number = tally[size]
                tally[size] = 0
                if wanted > 0 and number > 0:
                    used = number if number < wanted else wanted
                    others = most + size * (used if wanted > used else used - 1)
                    most += size * used
                    wanted -= used
            tally[0] = 0
            if wanted > 0:
                others = most
            if most < left:
                level -= 1
                continue
            # A candidate that leaves more than the others can cover is in no such cover.
            for j in range(c):
                if gain[j] + others < left:
                    free[allowed + j // BITS] &= ~(1 << (j % BITS))
            chosen, fewest = -1, c + 1
            for i in range(e):
                if bare[here + i // BITS] >> (i % BITS) & 1:
                    number = 0
                    for s in range(slots):
                        number += popcount(row[i * slots + s] & free[allowed + s])
                        if number >= fewest:
                            break
                    if number < fewest:
                        chosen, fewest = i, number
                        if number == 0:
                            break
            # The children: candidates of that element, largest gain first, ties to the lower index.
            number = 0
            begin = level * c
            if fewest > 0:
                for j in range(c):
                    if row[chosen * slots + j // BITS] & free[allowed + j // BITS] & (1 << (j % BITS)):
                        at = number
                        while at > 0 and gain[child[begin + at - 1]] < gain[j]:
                            child[begin + at] = child[begin + at - 1]
                            at -= 1
                        child[begin + at] = j
                        number += 1
            count[level] = number
        if place[level] >= count[level]:
            level -= 1
            continue
        j = child[level * c + place[level]]
        place[level] += 1
        # Covers with this candidate are searched now; its later siblings do without it.
        free[allowed + j // BITS] &= ~(1 << (j % BITS))
        pick[level] = j
        below = here + words
        first = -1
        for w in range(words):
            rest = bare[here + w] & ~col[w * c + j]
            bare[below + w] = rest
            if first < 0 and rest:
                at = 0
                while not rest >> at & 1:
                    at += 1
                first = w * BITS + at
        if first < 0:
            for deeper in range(level + 1, k):
                pick[deeper] = -1
            return FOUND
        if left_picks == 1:
            continue
        if left_picks == 2:
            # The last pick covers an element that is left, and all others too.
            for s in range(slots):
                possible = row[first * slots + s] & free[allowed + s]
                at = 0
                while possible:
                    if possible & 1:
                        last = s * BITS + at
                        w = 0
                        while w < words and not bare[below + w] & ~col[w * c + last]:
                            w += 1
                        if w == words:
                            pick[level + 1] = last
                            for deeper in range(level + 2, k):
                                pick[deeper] = -1
                            return FOUND
                    possible >>= 1
                    at += 1
            continue
        for s in range(slots):
            free[allowed + slots + s] = free[allowed + s]
        level += 1
        place[level] = -1
    state[0] = -1
    return NOTHING
