"""Exact reductions of a covering instance of up to 64 candidates and elements, on bit sets.

One source for two executions, here and in `branch_and_bound` and `bitset_batch`. As it stands it runs on Python
ints and lists; `exact_kernels` compiles the same functions for uint64 arrays. Both take the same decisions in the
same order, so they return the same cover. Two rules make that possible: masks come only from the table `bit`
(no integer literal meets a mask), and the two operations that differ are the functions `lowest` and `size`.

Names: `rows[e]` are the candidates of element e, `cols[c]` the elements of candidate c, `elements` and `units` the
masks of those still undecided, `need[e]` how often e must still be covered, `cost[c]` what a candidate costs.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "component",
    "cost_step",
    "cover_greedily",
    "drop_redundant",
    "lowest",
    "reduce_node",
    "size",
    "take",
    "total",
]


def lowest(mask: Any) -> Any:
    """Return the position of the lowest set bit."""
    return (mask & -mask).bit_length() - 1


def size(mask: Any) -> Any:
    """Return the number of set bits."""
    return mask.bit_count()


def take(cols: Any, need: Any, bit: Any, elements: Any, c: Any) -> Any:
    """Lower the need of what candidate c covers, in place; return the elements still open."""
    hit = cols[c] & elements
    while hit:
        e = lowest(hit)
        hit ^= bit[e]
        need[e] -= 1
        if need[e] == 0:
            elements ^= bit[e]
    return elements


def total(cost: Any, bit: Any, chosen: Any) -> float:
    """Return the cost of a mask of candidates, summed from the lowest number on."""
    value = 0.0
    while chosen:
        c = lowest(chosen)
        chosen ^= bit[c]
        value += cost[c]
    return value


def cost_step(cost: Any, bit: Any, units: Any) -> float:
    """Return a number that every difference of two covers' costs is a multiple of, 0.0 if none is known.

    Integral costs have their greatest common divisor, equal ones (to rounding) themselves.
    """
    divisor = total = first = 0.0
    integral = equal = True
    rest = units
    while rest:
        c = lowest(rest)
        rest ^= bit[c]
        value = cost[c]
        if first == 0.0:
            first = value
        equal = equal and value == first
        total += value
        integral = integral and value == value // 1.0 and total < 9007199254740992.0  # 2^53: sums stay exact
        if integral:
            while value > 0.0:
                divisor, value = value, divisor % value
    if integral:
        return divisor
    return first if equal else 0.0


def reduce_node(
    rows: Any, cols: Any, cost: Any, need: Any, bit: Any, elements: Any, units: Any
) -> tuple[Any, Any, Any, Any, Any]:
    """Shrink an instance to a fixed point without losing all its optimal covers; `need` is updated in place.

    Take the candidates of an element that needs all of them; drop an element that is covered as often as it needs
    whenever another one is; drop a candidate whose elements, all needed once, another one covers at no higher cost
    (ties: the higher number goes).

    Returns:
        Whether a cover exists, the elements and candidates left, the candidates taken and their cost.

    References: Weihe (1998), Covering trains by stations or the power of data reduction.
    """
    chosen = bit[0] ^ bit[0]
    value = 0.0
    changed = True
    while changed and elements:
        changed = False
        several = bit[0] ^ bit[0]
        left = elements
        while left:
            e = lowest(left)
            left ^= bit[e]
            if not elements & bit[e]:
                continue
            row = rows[e] & units
            count = size(row)
            if count < need[e]:
                return False, elements, units, chosen, value
            if count == need[e]:
                changed = True
                chosen |= row
                units ^= row
                while row:
                    c = lowest(row)
                    row ^= bit[c]
                    value += cost[c]
                    elements = take(cols, need, bit, elements, c)
                continue
            same = elements
            while row and same != bit[e]:
                c = lowest(row)
                row ^= bit[c]
                same &= cols[c]
            same &= ~bit[e]
            while same:
                f = lowest(same)
                same ^= bit[f]
                if need[f] <= need[e]:
                    elements ^= bit[f]
                    changed = True
            if need[e] > 1:
                several |= bit[e]
        left = units
        while left:
            c = lowest(left)
            left ^= bit[c]
            col = cols[c] & elements
            if not col:
                units ^= bit[c]
                continue
            if col & several:
                continue
            rest = col
            same = units
            while rest and same != bit[c]:
                e = lowest(rest)
                rest ^= bit[e]
                same &= rows[e]
            same &= ~bit[c]
            while same:
                d = lowest(same)
                same ^= bit[d]
                if cost[d] < cost[c] or (cost[d] == cost[c] and (d < c or (cols[d] & elements) != col)):
                    units ^= bit[c]
                    changed = True
                    break
    return True, elements, units, chosen, value


def component(rows: Any, cols: Any, bit: Any, elements: Any, units: Any) -> tuple[Any, Any]:
    """Return the elements and candidates connected to the lowest element."""
    found = bit[lowest(elements)]
    reached = bit[0] ^ bit[0]
    fresh = found
    while fresh:
        e = lowest(fresh)
        fresh ^= bit[e]
        new = rows[e] & units & ~reached
        reached |= new
        while new:
            c = lowest(new)
            new ^= bit[c]
            more = cols[c] & elements & ~found
            found |= more
            fresh |= more
    return found, reached


def cover_greedily(
    rows: Any, cols: Any, cost: Any, need: Any, scratch: Any, bit: Any, elements: Any, units: Any
) -> Any:
    """Return a cover: most coverage per cost first (ties: lower number), then without the redundant ones.

    `need` stays as it is; `scratch` is overwritten.
    """
    chosen = bit[0] ^ bit[0]
    left = elements
    while left:
        e = lowest(left)
        left ^= bit[e]
        scratch[e] = need[e]
    left = elements
    while left:
        best, best_count, best_cost = -1, 0, 0.0
        rest = units & ~chosen
        while rest:
            c = lowest(rest)
            rest ^= bit[c]
            count = size(cols[c] & left)
            if count * best_cost > best_count * cost[c] or (count and best < 0):
                best, best_count, best_cost = c, count, cost[c]
        chosen |= bit[best]
        left = take(cols, scratch, bit, left, best)
    return drop_redundant(rows, cols, cost, need, bit, elements, chosen, chosen)


def drop_redundant(
    rows: Any, cols: Any, cost: Any, need: Any, bit: Any, elements: Any, chosen: Any, droppable: Any
) -> Any:
    """Drop redundant candidates of a cover, dearest first (ties: higher number first)."""
    left = droppable
    while left:
        dearest = lowest(left)
        rest = left
        while rest:
            c = lowest(rest)
            rest ^= bit[c]
            if cost[c] >= cost[dearest]:
                dearest = c
        left ^= bit[dearest]
        col = cols[dearest] & elements
        spare = True
        while col and spare:
            e = lowest(col)
            col ^= bit[e]
            spare = size(rows[e] & chosen) > need[e]
        if spare:
            chosen ^= bit[dearest]
    return chosen
