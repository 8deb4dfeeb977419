"""One loop: row-weighting local search for set cover, on arrays or on lists.

Score of a candidate: the weight of the rows (elements) it would newly help if it is out, of the rows that
would miss it if it is in. Adding or removing a candidate leaves its own score as it is and changes those
that share a row with it. A heap holds the chosen candidates, least score per cost first.
"""

from __future__ import annotations

from topoprune_solvers.compiled import kernel

__all__ = ["search_kernel"]

# Entries of `state`.
CHOSEN, BARE, STEP, RANDOM, JOURNAL, LAST = 0, 1, 2, 3, 4, 5
# Answers.
RUNNING, TARGET, EXHAUSTED = 0, 1, 2


@kernel
def before(a, b, score, stamp, cost):  # type: ignore[no-untyped-def]
    """Return whether a chosen candidate leaves before another: less score per cost, then longer in, then lower."""
    left, right = score[a] * cost[b], score[b] * cost[a]
    if left != right:
        return left < right
    if stamp[a] != stamp[b]:
        return stamp[a] < stamp[b]
    return a < b


@kernel
def sift_up(heap, place, position, score, stamp, cost):  # type: ignore[no-untyped-def]
    """Move the entry at a position of the heap towards the front, after its score fell. O(log size)."""
    item = heap[position]
    while position > 0:
        parent = (position - 1) // 2
        other = heap[parent]
        if not before(item, other, score, stamp, cost):
            break
        heap[position] = other
        place[other] = position
        position = parent
    heap[position] = item
    place[item] = position


@kernel
def sift_down(heap, place, position, size, score, stamp, cost):  # type: ignore[no-untyped-def]
    """Move the entry at a position of the heap towards the end, after its score rose. O(log size)."""
    item = heap[position]
    while True:
        child = 2 * position + 1
        if child >= size:
            break
        if child + 1 < size and before(heap[child + 1], heap[child], score, stamp, cost):
            child += 1
        other = heap[child]
        if not before(other, item, score, stamp, cost):
            break
        heap[position] = other
        place[other] = position
        position = child
    heap[position] = item
    place[item] = position


@kernel
def add(  # type: ignore[no-untyped-def]
    candidate, row_start, row, col_start, col, demand, cost, chosen, count, only, weight, score, stamp, fresh,
    heap, place, bare, bare_at, state,
):  # fmt: skip
    """Choose a candidate."""
    chosen[candidate] = 1
    for entry in range(col_start[candidate], col_start[candidate + 1]):
        element = col[entry]
        had, asked = count[element], demand[element]
        if had + 1 == asked:
            state[BARE] -= 1
            last, hole = bare[state[BARE]], bare_at[element]
            bare[hole] = last
            bare_at[last] = hole
            for position in range(row_start[element], row_start[element + 1]):
                other = row[position]
                if chosen[other] == 0:
                    score[other] -= weight[element]
                    fresh[other] = 1
        elif had == asked:
            if asked == 1:
                other = only[element]
                score[other] -= weight[element]
                sift_up(heap, place, place[other], score, stamp, cost)
            else:
                for position in range(row_start[element], row_start[element + 1]):
                    other = row[position]
                    if chosen[other] == 1 and other != candidate:
                        score[other] -= weight[element]
                        sift_up(heap, place, place[other], score, stamp, cost)
        count[element] = had + 1
        only[element] ^= candidate
    stamp[candidate] = state[STEP]
    heap[state[CHOSEN]] = candidate
    state[CHOSEN] += 1
    sift_up(heap, place, state[CHOSEN] - 1, score, stamp, cost)


@kernel
def remove(  # type: ignore[no-untyped-def]
    candidate, row_start, row, col_start, col, demand, cost, chosen, count, only, weight, score, stamp, fresh,
    heap, place, bare, bare_at, state,
):  # fmt: skip
    """Take a candidate out."""
    state[CHOSEN] -= 1
    last, hole = heap[state[CHOSEN]], place[candidate]
    place[candidate] = -1
    if last != candidate:
        heap[hole] = last
        place[last] = hole
        sift_up(heap, place, hole, score, stamp, cost)
        sift_down(heap, place, place[last], state[CHOSEN], score, stamp, cost)
    chosen[candidate] = 0
    fresh[candidate] = 0
    stamp[candidate] = state[STEP]
    for entry in range(col_start[candidate], col_start[candidate + 1]):
        element = col[entry]
        had, asked = count[element], demand[element]
        count[element] = had - 1
        only[element] ^= candidate
        if had == asked:
            bare[state[BARE]] = element
            bare_at[element] = state[BARE]
            state[BARE] += 1
            for position in range(row_start[element], row_start[element + 1]):
                other = row[position]
                if chosen[other] == 0 and other != candidate:
                    score[other] += weight[element]
                    fresh[other] = 1
        elif had == asked + 1:
            if asked == 1:
                other = only[element]
                score[other] += weight[element]
                sift_down(heap, place, place[other], state[CHOSEN], score, stamp, cost)
            else:
                for position in range(row_start[element], row_start[element + 1]):
                    other = row[position]
                    if chosen[other] == 1:
                        score[other] += weight[element]
                        sift_down(heap, place, place[other], state[CHOSEN], score, stamp, cost)


@kernel
def search_kernel(  # type: ignore[no-untyped-def]
    row_start, row, col_start, col, demand, cost, chosen, count, only, weight, score, stamp, fresh,
    heap, place, bare, bare_at, best, journal, state, value, steps, target,
):  # fmt: skip
    """Take `steps` steps: record a cover that is cheaper than the best, take out one candidate, cover again.

    Args:
        chosen: 0 or 1. count: chosen candidates of each row. only: XOR of them (the one, if there is one).
        weight, score: see above. stamp: step of a candidate's last move.
        fresh: 0 from a candidate's removal until its score changed by others' moves: it may not return.
        heap, place: chosen candidates and their positions. bare, bare_at: rows below demand and their positions.
        best: the cheapest cover. journal: moves since then (overfull: copy everything).
        state: [chosen candidates, rows below demand, step, random state, length of journal, last added].
        value: [cost of chosen, cost of best, smallest improvement].

    Returns:
        RUNNING, TARGET (the best costs at most the target) or EXHAUSTED (nothing cheaper can exist).
    """
    for _ in range(steps):
        state[STEP] += 1
        # Candidates nobody would miss go at once.
        while state[CHOSEN] > 0 and score[heap[0]] == 0:
            gone = heap[0]
            remove(gone, row_start, row, col_start, col, demand, cost, chosen, count, only, weight, score, stamp,
                   fresh, heap, place, bare, bare_at, state)  # fmt: skip
            value[0] -= cost[gone]
            if state[JOURNAL] < len(journal):
                journal[state[JOURNAL]] = gone
            state[JOURNAL] += 1
        if state[BARE] == 0:
            if value[0] < value[1] - value[2]:
                if state[JOURNAL] <= len(journal):
                    for position in range(state[JOURNAL]):
                        best[journal[position]] = chosen[journal[position]]
                else:
                    for candidate in range(len(best)):
                        best[candidate] = chosen[candidate]
                state[JOURNAL] = 0
                value[1] = value[0]
            if value[1] <= target:
                return TARGET
            if state[CHOSEN] == 0:
                return EXHAUSTED
            gone = heap[0]
            remove(gone, row_start, row, col_start, col, demand, cost, chosen, count, only, weight, score, stamp,
                   fresh, heap, place, bare, bare_at, state)  # fmt: skip
            value[0] -= cost[gone]
            if state[JOURNAL] < len(journal):
                journal[state[JOURNAL]] = gone
            state[JOURNAL] += 1
        if state[CHOSEN] > 0:
            gone = heap[0]
            if gone == state[LAST] and state[CHOSEN] > 1:
                # The last one added stays for a step: the next in line is one of the root's two children.
                gone = heap[1]
                if state[CHOSEN] > 2 and before(heap[2], gone, score, stamp, cost):
                    gone = heap[2]
            remove(gone, row_start, row, col_start, col, demand, cost, chosen, count, only, weight, score, stamp,
                   fresh, heap, place, bare, bare_at, state)  # fmt: skip
            value[0] -= cost[gone]
            if state[JOURNAL] < len(journal):
                journal[state[JOURNAL]] = gone
            state[JOURNAL] += 1
        affordable = True
        while state[BARE] > 0 and affordable:
            state[RANDOM] = state[RANDOM] * 48271 % 2147483647
            element = bare[state[RANDOM] % state[BARE]]
            chosen_one, allowed = -1, 0
            for position in range(row_start[element], row_start[element + 1]):
                other = row[position]
                if chosen[other] == 1 or value[0] + cost[other] >= value[1] - value[2] or fresh[other] < allowed:
                    continue
                if chosen_one < 0 or fresh[other] > allowed:
                    chosen_one, allowed = other, fresh[other]
                    continue
                left, right = score[other] * cost[chosen_one], score[chosen_one] * cost[other]
                if left > right or (left == right and stamp[other] < stamp[chosen_one]):
                    chosen_one = other
            if chosen_one < 0:
                affordable = False
                if state[CHOSEN] == 0:
                    return EXHAUSTED
                break
            add(chosen_one, row_start, row, col_start, col, demand, cost, chosen, count, only, weight, score, stamp,
                fresh, heap, place, bare, bare_at, state)  # fmt: skip
            value[0] += cost[chosen_one]
            state[LAST] = chosen_one
            if state[JOURNAL] < len(journal):
                journal[state[JOURNAL]] = chosen_one
            state[JOURNAL] += 1
            if state[BARE] > 0:
                # One of the rows still bare, not all: else weights race where thousands are bare at a time.
                missed = bare[state[RANDOM] % state[BARE]]
                weight[missed] += 1
                for position in range(row_start[missed], row_start[missed + 1]):
                    other = row[position]
                    score[other] += 1
                    if chosen[other] == 1:
                        sift_down(heap, place, place[other], state[CHOSEN], score, stamp, cost)
    return RUNNING
