"""Loops of soft domination over the rows of a `Service` table.

Only scalars are read and written, so every kernel also runs uncompiled on Python lists, several times faster
than on arrays (`topoprune_solvers.budgeted.service.run`). Both add in the same order: same answers to the bit.
A kernel stops after about `effort` row entries, so that its caller can look at the clock.
"""

from __future__ import annotations

from typing import Any

from topoprune_solvers.compiled import kernel

__all__ = ["lazy_greedy", "priced", "served", "swap_units"]

Column = Any  # an array, or a list where the kernel runs uncompiled


@kernel
def priced(indptr: Column, indices: Column, gives: Column, price: Column, out: Column) -> None:
    """Set out[j] to the sum over row j of what is given beyond the price of the receiver."""
    for unit in range(len(indptr) - 1):
        total = 0.0
        for entry in range(indptr[unit], indptr[unit + 1]):
            rise = gives[entry] - price[indices[entry]]
            if rise > 0.0:
                total += rise
        out[unit] = total


@kernel
def served(indptr: Column, indices: Column, gives: Column, price: Column, chosen: Column, out: Column) -> None:
    """Set out[i] to the number of chosen units that give i more than its price."""
    for unit in range(len(out)):
        out[unit] = 0
    for unit in chosen:
        for entry in range(indptr[unit], indptr[unit + 1]):
            if gives[entry] > price[indices[entry]]:
                out[indices[entry]] += 1


@kernel
def lazy_greedy(
    indptr: Column,
    indices: Column,
    gives: Column,
    label: Column,
    low: Column,
    high: Column,
    count: Column,
    slack: Column,
    reached: Column,
    keep: Column,
    heap_gain: Column,
    heap_unit: Column,
    target: int,
    least: float,
    state: Column,
    effort: int,
) -> None:
    """Take the fitting unit of largest gain, until `target` are taken, from a heap of gains that may be out of date.

    Args:
        count, slack: kept units of each group, and (1,) units not spoken for; updated.
        reached: (n,) what each unit receives so far; updated. keep: (n,) bool; updated.
        heap_gain, heap_unit: binary heap, largest gain first, ties to the lower unit; updated.
        state: (heap size, units taken, 1 once the largest gain is `least` or less); updated.
        least: stop at a gain of this or less.
    """
    size, taken = state[0], state[1]
    while taken < target and size > 0 and effort > 0:
        unit = heap_unit[0]
        group = label[unit]
        gain = 0.0
        # A full group never opens again.
        drop = count[group] >= high[group] or (count[group] >= low[group] and slack[0] <= 0)
        if not drop:
            start, stop = indptr[unit], indptr[unit + 1]
            effort -= stop - start
            for entry in range(start, stop):
                rise = gives[entry] - reached[indices[entry]]
                if rise > 0.0:
                    gain += rise
            # Gains only fall; the tolerance keeps rounding from sending an entry round for ever.
            if gain >= heap_gain[0] * (1.0 - 1e-12):
                if gain <= least:
                    state[2] = 1
                    break
                for entry in range(start, stop):
                    if gives[entry] > reached[indices[entry]]:
                        reached[indices[entry]] = gives[entry]
                keep[unit] = True
                if count[group] >= low[group]:
                    slack[0] -= 1
                count[group] += 1
                taken += 1
                drop = True
        if drop:
            size -= 1
            gain, unit = heap_gain[size], heap_unit[size]
        # Let the new entry at the root sink to its place.
        place = 0
        while True:
            child = 2 * place + 1
            if child >= size:
                break
            right = child + 1
            if right < size and (
                heap_gain[right] > heap_gain[child]
                or (heap_gain[right] == heap_gain[child] and heap_unit[right] < heap_unit[child])
            ):
                child = right
            if gain > heap_gain[child] or (gain == heap_gain[child] and unit < heap_unit[child]):
                break
            heap_gain[place], heap_unit[place] = heap_gain[child], heap_unit[child]
            place = child
        if size > 0:
            heap_gain[place], heap_unit[place] = gain, unit
    state[0] = size
    state[1] = taken


@kernel
def swap_units(
    indptr: Column,
    indices: Column,
    gives: Column,
    gets: Column,
    label: Column,
    low: Column,
    high: Column,
    count: Column,
    fixed: Column,
    keep: Column,
    server: Column,
    first: Column,
    second: Column,
    loss: Column,
    rescue: Column,
    touched: Column,
    weakest: Column,
    threshold: float,
    state: Column,
    effort: int,
) -> None:
    """Go round the units that are out; swap each with the kept unit whose place it fills best, if that gains.

    Args:
        gives, gets: what the unit of a row gives to, and receives from, each entry.
        fixed: (n,) bool, forced or forbidden. keep: (n,) bool; updated.
        server: (n,) unit that gives each one most, or -1. first, second: (n,) largest and second largest
            amount received from a kept unit, 0 without. loss: (n,) what goes with each kept unit. All updated.
        rescue: (n,) zeros. touched: (n,) and weakest: (g,) scratch.
        state: (next unit to look at, units looked at since the last swap, swaps); updated. Done when the
            second one reaches n.
        threshold: smallest gain worth a swap.
    """
    n, groups = len(keep), len(low)
    stale = True
    spare = -1
    while state[1] < n and effort > 0:
        if stale:
            # Least loss in each group, and over the groups that may shrink.
            for group in range(groups):
                weakest[group] = -1
            for unit in range(n):
                if keep[unit] and not fixed[unit]:
                    group = label[unit]
                    if weakest[group] < 0 or loss[unit] < loss[weakest[group]]:
                        weakest[group] = unit
            spare = -1
            for group in range(groups):
                unit = weakest[group]
                if unit >= 0 and count[group] > low[group] and (spare < 0 or loss[unit] < loss[spare]):
                    spare = unit
            stale = False
            effort -= n
        new = state[0]
        state[0] = new + 1 if new + 1 < n else 0
        state[1] += 1
        if keep[new] or fixed[new]:
            continue
        own = label[new]
        roomy = count[own] < high[own]
        gain, number = 0.0, 0
        effort -= indptr[new + 1] - indptr[new]
        for entry in range(indptr[new], indptr[new + 1]):
            unit, amount = indices[entry], gives[entry]
            if amount > second[unit]:
                part = amount - second[unit]
                if amount > first[unit]:
                    gain += amount - first[unit]
                    part = first[unit] - second[unit]
                old = server[unit]
                if old >= 0 and part > 0.0:
                    if rescue[old] == 0.0:
                        touched[number] = old
                        number += 1
                    rescue[old] += part
        out, cost = -1, 0.0
        if weakest[own] >= 0:
            out = weakest[own]
            cost = loss[out] - rescue[out]
        if roomy and spare >= 0 and (out < 0 or loss[spare] - rescue[spare] < cost):
            out = spare
            cost = loss[out] - rescue[out]
        for place in range(number):
            old = touched[place]
            less = loss[old] - rescue[old]
            rescue[old] = 0.0
            if not fixed[old] and (out < 0 or less < cost):
                group = label[old]
                if group == own or (roomy and count[group] > low[group]):
                    out, cost = old, less
        if out < 0 or gain - cost <= threshold:
            continue
        keep[out], keep[new] = False, True
        count[label[out]] -= 1
        count[own] += 1
        for turn in range(2):
            mover = out if turn == 0 else new
            for entry in range(indptr[mover], indptr[mover + 1]):
                unit = indices[entry]
                if server[unit] >= 0:
                    loss[server[unit]] -= first[unit] - second[unit]
                best, most, next_most = -1, 0.0, 0.0
                for other in range(indptr[unit], indptr[unit + 1]):
                    if keep[indices[other]]:
                        amount = gets[other]
                        if amount > most:
                            best, next_most, most = indices[other], most, amount
                        elif amount > next_most:
                            next_most = amount
                effort -= indptr[unit + 1] - indptr[unit]
                server[unit], first[unit], second[unit] = best, most, next_most
                if best >= 0:
                    loss[best] += most - next_most
        loss[out] = 0.0
        state[1] = 0
        state[2] += 1
        stale = True
