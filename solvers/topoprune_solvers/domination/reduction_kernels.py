"""Loops of the covering reductions: a worklist over rows and columns that shrink in place.

Legend: row = candidates of an element, col = elements of a candidate; ``*_size`` entries of a row or column
that are still stored (dead ones are squeezed out when it is next scanned), ``*_live`` entries that are alive.
A signature is a 62-bit set with bit ``number % 62`` of every member: a subset's lies within its superset's.
"""

from __future__ import annotations

from topoprune_solvers.compiled import kernel

__all__ = ["reduce_kernel", "take_kernel"]

GONE, LIVE, TAKEN = 0, 1, 2


@kernel
def squeeze(items, begin, size, alive):  # type: ignore[no-untyped-def]
    """Move live entries to the front, in order; return how many."""
    end = begin
    for position in range(begin, begin + size):
        item = items[position]
        if alive[item] == LIVE:
            items[end] = item
            end += 1
    return end - begin


@kernel
def contains(items, begin, size, item):  # type: ignore[no-untyped-def]
    """Return whether ascending items hold one, by bisection."""
    low, high = begin, begin + size
    while low < high:
        middle = (low + high) // 2
        if items[middle] < item:
            low = middle + 1
        else:
            high = middle
    return low < begin + size and items[low] == item


@kernel
def push(queue, waiting, state, head, number):  # type: ignore[no-untyped-def]
    """Append to a ring of state[head + 1] entries from state[head], once."""
    if waiting[number] == 0:
        waiting[number] = 1
        queue[(state[head] + state[head + 1]) % len(queue)] = number
        state[head + 1] += 1


@kernel
def drop_element(element, row, row_start, row_size, alive_e, alive_c, live_c, empty, queue_c, wait_c, state):  # type: ignore[no-untyped-def]
    """Remove an element that another one implies, or that is covered."""
    alive_e[element] = GONE
    begin = row_start[element]
    for position in range(begin, begin + row_size[element]):
        candidate = row[position]
        if alive_c[candidate] == LIVE:
            live_c[candidate] -= 1
            if live_c[candidate] == 0 and empty:
                alive_c[candidate] = GONE
            else:
                push(queue_c, wait_c, state, 2, candidate)
    return row_size[element]


@kernel
def drop_candidate(candidate, col, col_start, col_size, alive_e, alive_c, live_e, queue_e, wait_e, state):  # type: ignore[no-untyped-def]
    """Remove a candidate that another one replaces."""
    alive_c[candidate] = GONE
    begin = col_start[candidate]
    for position in range(begin, begin + col_size[candidate]):
        element = col[position]
        if alive_e[element] == LIVE:
            live_e[element] -= 1
            push(queue_e, wait_e, state, 0, element)
    return col_size[candidate]


@kernel
def take(  # type: ignore[no-untyped-def]
    candidate, row, row_start, row_size, col, col_start, col_size, demand, alive_e, alive_c, live_e, live_c,
    empty, queue_e, wait_e, queue_c, wait_c, state,
):  # fmt: skip
    """Choose a candidate for good."""
    alive_c[candidate] = TAKEN
    begin, work = col_start[candidate], col_size[candidate]
    for position in range(begin, begin + col_size[candidate]):
        element = col[position]
        if alive_e[element] == LIVE:
            live_e[element] -= 1
            demand[element] -= 1
            if demand[element] == 0:
                work += drop_element(
                    element, row, row_start, row_size, alive_e, alive_c, live_c, empty, queue_c, wait_c, state
                )
            else:
                state[4] = 1
                push(queue_e, wait_e, state, 0, element)
    return work


@kernel
def reduce_kernel(  # type: ignore[no-untyped-def]
    row, row_start, row_size, col, col_start, col_size, cost, demand, alive_e, alive_c, live_e, live_c,
    queue_e, wait_e, queue_c, wait_c, sign_e, sign_c, state, rules, budget,
):  # fmt: skip
    """Run the rules until the worklists are empty or `budget` entries were looked at; return whether work is left.

    Args:
        alive_e, alive_c: GONE, LIVE or TAKEN. live_e, live_c: live entries of each row and column.
        queue_*, wait_*: rings of elements and candidates to look at, and who is in them.
        sign_*: signatures, never smaller than the true ones.
        state: [head, size] of the element ring, the same of the candidate ring, 1 if some demand above 1 fell.
        rules: flags [candidate subset, element subset, unit, empty].
    """
    work = 0
    empty = rules[3] != 0
    while work < budget:
        if state[1] > 0:
            element = queue_e[state[0]]
            state[0] = (state[0] + 1) % len(queue_e)
            state[1] -= 1
            wait_e[element] = 0
            work += 1
            if alive_e[element] != LIVE:
                continue
            begin = row_start[element]
            if row_size[element] != live_e[element]:
                work += row_size[element]
                row_size[element] = squeeze(row, begin, row_size[element], alive_c)
            size = row_size[element]
            if size == demand[element] and rules[2]:
                for position in range(begin, begin + size):
                    work += take(
                        row[position], row, row_start, row_size, col, col_start, col_size, demand, alive_e, alive_c,
                        live_e, live_c, empty, queue_e, wait_e, queue_c, wait_c, state,
                    )  # fmt: skip
                continue
            if not rules[1]:
                continue
            sign, pivot = 0, row[begin]
            for position in range(begin, begin + size):
                candidate = row[position]
                sign |= 1 << (candidate % 62)
                if live_c[candidate] < live_c[pivot]:
                    pivot = candidate
            sign_e[element] = sign
            first = col_start[pivot]
            if col_size[pivot] != live_c[pivot]:
                work += col_size[pivot]
                col_size[pivot] = squeeze(col, first, col_size[pivot], alive_e)
            work += size + col_size[pivot]
            for place in range(first, first + col_size[pivot]):
                other = col[place]
                if other == element or live_e[other] < size or demand[other] > demand[element] or sign & ~sign_e[other]:
                    continue
                inside = True
                for position in range(begin, begin + size):
                    work += 4
                    if not contains(row, row_start[other], row_size[other], row[position]):
                        inside = False
                        break
                if inside:
                    work += drop_element(
                        other, row, row_start, row_size, alive_e, alive_c, live_c, empty, queue_c, wait_c, state
                    )
        elif state[3] > 0:
            candidate = queue_c[state[2]]
            state[2] = (state[2] + 1) % len(queue_c)
            state[3] -= 1
            wait_c[candidate] = 0
            work += 1
            if alive_c[candidate] != LIVE or not rules[0]:
                continue
            begin = col_start[candidate]
            if col_size[candidate] != live_c[candidate]:
                work += col_size[candidate]
                col_size[candidate] = squeeze(col, begin, col_size[candidate], alive_e)
            size = col_size[candidate]
            if size == 0:
                continue
            sign, pivot, single = 0, col[begin], True
            for position in range(begin, begin + size):
                element = col[position]
                sign |= 1 << (element % 62)
                single = single and demand[element] == 1
                if live_e[element] < live_e[pivot]:
                    pivot = element
            sign_c[candidate] = sign
            if not single:
                continue
            first = row_start[pivot]
            if row_size[pivot] != live_e[pivot]:
                work += row_size[pivot]
                row_size[pivot] = squeeze(row, first, row_size[pivot], alive_c)
            work += size + row_size[pivot]
            for place in range(first, first + row_size[pivot]):
                other = row[place]
                if (
                    other == candidate
                    or alive_c[other] != LIVE
                    or live_c[other] < size
                    or cost[other] > cost[candidate]
                    or sign & ~sign_c[other]
                ):
                    continue
                inside = True
                for position in range(begin, begin + size):
                    work += 4
                    if not contains(col, col_start[other], col_size[other], col[position]):
                        inside = False
                        break
                if not inside:
                    continue
                # Twins: the lower index stays.
                twin = live_c[other] == size and cost[other] == cost[candidate] and other > candidate
                gone = other if twin else candidate
                work += drop_candidate(gone, col, col_start, col_size, alive_e, alive_c, live_e, queue_e, wait_e, state)
                if not twin:
                    break
        else:
            return False
    return True


@kernel
def take_kernel(  # type: ignore[no-untyped-def]
    chosen, row, row_start, row_size, col, col_start, col_size, cost, demand, alive_e, alive_c, live_e, live_c,
    queue_e, wait_e, queue_c, wait_c, sign_e, sign_c, state, rules,
):  # fmt: skip
    """Take some candidates, as far as they still cover anything that is asked for; arguments as in `reduce_kernel`."""
    empty = rules[3] != 0
    for candidate in chosen:
        if alive_c[candidate] == LIVE:
            take(
                candidate, row, row_start, row_size, col, col_start, col_size, demand, alive_e, alive_c,
                live_e, live_c, empty, queue_e, wait_e, queue_c, wait_c, state,
            )  # fmt: skip
