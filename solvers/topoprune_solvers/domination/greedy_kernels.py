"""Greedy cover and backward pruning as loops over arrays."""

from __future__ import annotations

import heapq

import numpy as np

from topoprune_solvers.compiled import kernel

__all__ = ["ascent_kernel", "bucket_greedy_kernel", "heap_greedy_kernel", "prune_kernel"]


@kernel
def count_gains(row_start, row, need, gain):  # type: ignore[no-untyped-def]
    """Add up, for each candidate, the elements in need; return how many are."""
    left = 0
    for element in range(need.size):
        if need[element] > 0:
            left += 1
            for position in range(row_start[element], row_start[element + 1]):
                gain[row[position]] += 1
    return left


@kernel
def bucket_greedy_kernel(row_start, row, col_start, col, need, keep, barred, room):  # type: ignore[no-untyped-def]
    """Add candidates of equal cost in greedy order; see `greedy_choice`.

    Candidates wait in linked lists by gain. Gains only fall, so a list is complete once the lists above it are
    done; members that fell meanwhile move down, the others are taken in ascending order.
    """
    candidates = keep.size
    gain = np.zeros(candidates, np.int64)
    left = count_gains(row_start, row, need, gain)
    top = 0
    for candidate in range(candidates):
        if keep[candidate] or barred[candidate]:
            continue
        top = max(top, gain[candidate])
    head = np.full(top + 1, -1, np.int64)
    following = np.empty(candidates, np.int64)
    for candidate in range(candidates - 1, -1, -1):
        if not (keep[candidate] or barred[candidate]):
            following[candidate] = head[gain[candidate]]
            head[gain[candidate]] = candidate
    queue = np.empty(candidates, np.int64)
    for level in range(top, 0, -1):
        size, candidate, ordered, last = 0, head[level], True, -1
        while candidate >= 0:
            after = following[candidate]
            now = gain[candidate]
            if now == level:
                queue[size] = candidate
                size += 1
                ordered = ordered and candidate > last
                last = candidate
            else:
                following[candidate] = head[now]
                head[now] = candidate
            candidate = after
        if not ordered:
            queue[:size].sort()
        for index in range(size):
            candidate = queue[index]
            now = gain[candidate]
            if now != level:
                following[candidate] = head[now]
                head[now] = candidate
                continue
            if left == 0 or room <= 0:
                return left
            keep[candidate] = True
            room -= 1
            for entry in range(col_start[candidate], col_start[candidate + 1]):
                element = col[entry]
                need[element] -= 1
                if need[element] == 0:
                    left -= 1
                    for position in range(row_start[element], row_start[element + 1]):
                        gain[row[position]] -= 1
    return left


@kernel
def heap_greedy_kernel(row_start, row, col_start, col, cost, need, keep, barred, room):  # type: ignore[no-untyped-def]
    """Add candidates in greedy order, least cost per gain first; see `greedy_choice`."""
    candidates = keep.size
    gain = np.zeros(candidates, np.int64)
    left = count_gains(row_start, row, need, gain)
    queue = [(0.0, 0, 0) for _ in range(0)]
    for candidate in range(candidates):
        if gain[candidate] > 0 and not (keep[candidate] or barred[candidate]):
            price = cost[candidate] / gain[candidate] if cost[candidate] > 0 else -np.inf
            queue.append((price, -gain[candidate], candidate))
    heapq.heapify(queue)
    while left > 0 and room > 0 and len(queue) > 0:
        _, recorded, candidate = queue[0]
        now = gain[candidate]
        if now != -recorded:
            if now > 0:
                price = cost[candidate] / now if cost[candidate] > 0 else -np.inf
                heapq.heapreplace(queue, (price, -now, candidate))
            else:
                heapq.heappop(queue)
            continue
        heapq.heappop(queue)
        keep[candidate] = True
        room -= 1
        for entry in range(col_start[candidate], col_start[candidate + 1]):
            element = col[entry]
            need[element] -= 1
            if need[element] == 0:
                left -= 1
                for position in range(row_start[element], row_start[element + 1]):
                    gain[row[position]] -= 1
    return left


@kernel
def prune_kernel(col_start, col, spare, keep, order):  # type: ignore[no-untyped-def]
    """Drop candidates, in order, whose elements all have some to spare (covers minus demand)."""
    for index in range(order.size):
        candidate = order[index]
        needed = False
        for entry in range(col_start[candidate], col_start[candidate + 1]):
            if spare[col[entry]] <= 0:
                needed = True
                break
        if not needed:
            keep[candidate] = False
            for entry in range(col_start[candidate], col_start[candidate + 1]):
                spare[col[entry]] -= 1


@kernel
def ascent_kernel(row_start, row, order, demand, slack):  # type: ignore[no-untyped-def]
    """Raise prices one by one as far as the slack of every candidate allows; return the rise of the dual value."""
    total = 0.0
    for element in order:
        begin, end = row_start[element], row_start[element + 1]
        rise = np.inf
        for position in range(begin, end):
            rise = min(rise, slack[row[position]])
        if 0.0 < rise < np.inf:
            total += demand[element] * rise
            for position in range(begin, end):
                slack[row[position]] -= rise
    return total
