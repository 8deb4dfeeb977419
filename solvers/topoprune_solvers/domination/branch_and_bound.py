"""Branch and bound for covering instances of up to 64 candidates and elements, on bit sets.

Runs on Python ints or, compiled, on uint64 arrays: see `bitset_reductions` for the rules and the names. Further
names: `price[e]` >= 0 is the dual price of an element, `reduced[c]` the cost of a candidate less the prices of its
elements; `state` holds what a search knows (see the constants).

References: Balas and Ho (1980), Set covering algorithms using cutting planes, heuristics and subgradient
optimization, Math. Prog. Study 12; Wedelin (1995), An algorithm for large scale 0-1 integer programming with
application to airline crew scheduling, Annals of OR 57 (prices between the two best values).
"""

from __future__ import annotations

import math
from typing import Any

from topoprune_solvers.domination.bitset_reductions import (
    component,
    cost_step,
    cover_greedily,
    lowest,
    reduce_node,
    size,
    take,
    total,
)

__all__ = ["STACK", "cover_search"]

STACK = 68  # each branching takes a candidate from both children and leaves one of them waiting
ROOT_SWEEPS, SWEEPS = 40, 1  # at most this many rounds of price improvement at the first and at the other nodes
SHARE = 0.6  # where between the two best values a price goes; measured on similarity and random graphs
PROGRESS = 0.002  # of the room: a round that gains less is the last
FEW = 8  # a node is reduced and bounded again only if at least one in so many candidates went
ROUNDING = 1e-11  # relative to the sum of prices: far above the error of some thousand additions

# state masks: best choice of the component, units taken in all, elements and units of components not begun
BEST_CHOICE, TAKEN, LATER_ELEMENTS, LATER_UNITS = 0, 1, 2, 3
# state numbers: best value of the component, largest value of interest, step between values, value that is good
# enough, cost of TAKEN, lower bound on the whole, largest cost of interest for the whole
BEST, LIMIT, STEP, ENOUGH, SPENT, BOUND, CUTOFF = 0, 1, 2, 3, 4, 5, 6
# state counters: nodes waiting, nodes visited, 1 before the first node of a component, 1 after the reductions,
# 1 while every search was finished, 1 while there is a cover within the cutoff, components begun
WAITING, NODES, FRESH, STARTED, COMPLETE, FOUND, COMPONENTS = 0, 1, 2, 3, 4, 5, 6
# a waiting node: masks of elements, units, choice; values spent and lower bound
ELEMENTS, UNITS, CHOICE = 0, 1, 2


def cover_search(instance: Any, stack: Any, work: Any, state: Any, node_limit: int, hurry: bool) -> bool:
    """Find a cheapest cover: reduce, split into components, search each.

    Args:
        instance: rows, cols, cost, bit. stack: masks, values, prices and needs of the waiting nodes.
        work: price, reduced, need, scratch, wanted (the need of each element; overwritten).
        state: masks, numbers, counters; at the start all zero but the elements and units of the instance,
            the cutoff, and COMPLETE = FOUND = 1.
        node_limit: number of nodes, over all components, after which to pause.
        hurry: at the limit settle for the incumbent of each component instead of pausing.

    Returns:
        True when done; False at the node limit: call again with a larger one to go on.

    Complexity: exponential in the worst case; some microseconds for 12 units, below 0.1 ms for most similarity graphs
        of 64 units.
    """
    rows, cols, cost, bit = instance
    masks, numbers, counters = state
    wanted = work[4]
    none = bit[0] ^ bit[0]
    if counters[STARTED] == 0:
        counters[STARTED] = 1
        elements, units = masks[LATER_ELEMENTS], masks[LATER_UNITS]
        numbers[STEP] = cost_step(cost, bit, units)
        free = none
        rest = units
        while rest:
            c = lowest(rest)
            rest ^= bit[c]
            if cost[c] <= 0.0:
                free |= bit[c]
                elements = take(cols, wanted, bit, elements, c)
        feasible, elements, units, chosen, value = reduce_node(rows, cols, cost, wanted, bit, elements, units & ~free)
        masks[TAKEN] = chosen | free
        numbers[SPENT] = numbers[BOUND] = value
        masks[LATER_ELEMENTS], masks[LATER_UNITS] = elements, units
        if not feasible or value > numbers[CUTOFF]:
            counters[FOUND] = 0
            return True
    while masks[LATER_ELEMENTS] != none or counters[WAITING] > 0:
        if counters[WAITING] == 0:
            elements, units = component(rows, cols, bit, masks[LATER_ELEMENTS], masks[LATER_UNITS])
            masks[LATER_ELEMENTS] &= ~elements
            masks[LATER_UNITS] &= ~units
            counters[COMPONENTS] += 1
            numbers[BEST] = math.inf
            numbers[LIMIT] = numbers[CUTOFF] - numbers[SPENT]
            deciding = masks[LATER_ELEMENTS] == none and numbers[CUTOFF] < math.inf
            numbers[ENOUGH] = numbers[LIMIT] if deciding else -math.inf
            begin(instance, stack, work, state, elements, units)
        if not search(instance, stack, work, state, node_limit):
            if not hurry:
                return False
            counters[COMPLETE] = 0
        lower = numbers[BEST]
        for depth in range(counters[WAITING]):
            lower = min(lower, stack[1][depth][1])
        step = numbers[STEP]
        if step > 0.0 and lower < numbers[BEST]:
            lower = min(numbers[BEST], math.ceil(lower / step - 1e-6) * step * (1.0 - 1e-15))
        counters[WAITING] = 0
        if numbers[BEST] == math.inf:
            counters[FOUND] = 0
            return True
        masks[TAKEN] |= masks[BEST_CHOICE]
        numbers[SPENT] += numbers[BEST]
        numbers[BOUND] += lower
    return True


def begin(instance: Any, stack: Any, work: Any, state: Any, elements: Any, units: Any) -> None:
    """Set up the search of one component: the greedy cover as incumbent, degree prices, the root on the stack."""
    rows, cols, cost, bit = instance
    price, _, _, scratch, wanted = work
    chosen = cover_greedily(rows, cols, cost, wanted, scratch, bit, elements, units)
    accept(state, chosen, total(cost, bit, chosen))
    rest = elements
    while rest:
        e = lowest(rest)
        rest ^= bit[e]
        row = rows[e] & units
        least = math.inf
        while row:
            c = lowest(row)
            row ^= bit[c]
            least = min(least, cost[c] / size(cols[c] & elements))
        price[e] = least
    state[2][FRESH] = 1
    push(stack, state, price, wanted, elements, units, bit[0] ^ bit[0], 0.0, 0.0)


def search(instance: Any, stack: Any, work: Any, state: Any, node_limit: int) -> bool:
    """Work through the waiting nodes; return False when the node limit came first."""
    rows, cols, cost, bit = instance
    stack_masks, stack_values, stack_price, stack_need = stack
    price, reduced, need, _, _ = work
    _, numbers, counters = state
    while counters[WAITING] > 0:
        if numbers[BEST] <= numbers[ENOUGH]:
            return True
        depth = counters[WAITING] - 1
        spent, lower = stack_values[depth][0], stack_values[depth][1]
        if lower > numbers[LIMIT]:
            counters[WAITING] = depth
            continue
        fresh = counters[FRESH] == 1
        if not fresh and counters[NODES] >= node_limit:
            return False
        counters[NODES] += 1
        counters[FRESH] = 0
        counters[WAITING] = depth
        elements = stack_masks[depth][ELEMENTS]
        units = stack_masks[depth][UNITS]
        choice = stack_masks[depth][CHOICE]
        for e in range(len(price)):
            price[e] = stack_price[depth][e]
            need[e] = stack_need[depth][e]
        alive = again = True
        while alive and again:
            feasible, elements, units, chosen, value = reduce_node(rows, cols, cost, need, bit, elements, units)
            choice |= chosen
            spent += value
            if feasible and not elements:
                accept(state, choice, spent)
            if not feasible or not elements or spent > numbers[LIMIT]:
                alive = False
                break
            room = numbers[LIMIT] - spent
            bound, drop, must = bound_node(
                rows, cols, cost, need, bit, elements, units, price, reduced, room, ROOT_SWEEPS if fresh else SWEEPS
            )
            lower = max(lower, spent + bound)
            alive = bound <= room
            again = bool(must) or (bool(drop) and (fresh or size(drop) * FEW >= size(units)))
            units &= ~(drop | must)
            choice |= must
            while must:
                c = lowest(must)
                must ^= bit[c]
                spent += cost[c]
                elements = take(cols, need, bit, elements, c)
        c = branching_unit(rows, cols, cost, need, bit, elements, units) if alive else -1
        if c >= 0:
            units ^= bit[c]
            push(stack, state, price, need, elements, units, choice, spent, lower)
            elements = take(cols, need, bit, elements, c)
            push(stack, state, price, need, elements, units, choice | bit[c], spent + cost[c], lower)
    return True


def bound_node(
    rows: Any,
    cols: Any,
    cost: Any,
    need: Any,
    bit: Any,
    elements: Any,
    units: Any,
    price: Any,
    reduced: Any,
    room: float,
    sweeps: int,
) -> tuple[float, Any, Any]:
    """Return a lower bound on covering the rest, the candidates to drop and those to take for a cover within `room`.

    A bound above `room` ends the node; otherwise a candidate goes (or must be taken) where the bound plus the
    size of its reduced cost exceeds the room.
    """
    rest = units
    while rest:
        c = lowest(rest)
        rest ^= bit[c]
        left = cost[c]
        col = cols[c] & elements
        while col:
            e = lowest(col)
            col ^= bit[e]
            left -= price[e]
        reduced[c] = left
    none = bit[0] ^ bit[0]
    bound = before = -1.0
    for _ in range(sweeps):
        sweep(rows, cols, need, bit, elements, units, price, reduced, SHARE)
        prices = 0.0
        rest = elements
        while rest:
            e = lowest(rest)
            rest ^= bit[e]
            prices += need[e] * price[e]
        bound = prices * (1.0 - ROUNDING)
        rest = units
        while rest:
            c = lowest(rest)
            rest ^= bit[c]
            if reduced[c] < 0.0:
                bound += reduced[c]
        if bound > room or bound - before < PROGRESS * room:
            break
        before = bound
    if bound > room:
        return bound, none, none
    drop = take = none
    rest = units
    while rest:
        c = lowest(rest)
        rest ^= bit[c]
        if reduced[c] > 0.0 and bound + reduced[c] > room:
            drop |= bit[c]
        elif reduced[c] < 0.0 and bound - reduced[c] > room:
            take |= bit[c]
    return bound, drop, take


def sweep(
    rows: Any, cols: Any, need: Any, bit: Any, elements: Any, units: Any, price: Any, reduced: Any, share: float
) -> None:
    """Improve the price of each element in turn, the others fixed; the dual bound never falls.

    With `need` r the bound is largest anywhere between the r-th and the next smallest of the values
    ``reduced + price`` of its candidates; `share` in [0, 1) says where to go in between. Away from the
    corner 0 the ascent does not get stuck as early.
    """
    left = elements
    while left:
        e = lowest(left)
        left ^= bit[e]
        low, high = _two_values(rows[e] & units, need[e], reduced, bit)
        old = price[e]
        new = max(0.0, old + low + share * (high - low))
        if new != old:
            price[e] = new
            row = rows[e] & units
            while row:
                c = lowest(row)
                row ^= bit[c]
                reduced[c] -= new - old


def _two_values(row: Any, rank: Any, reduced: Any, bit: Any) -> tuple[Any, Any]:
    """Return the rank-th smallest reduced cost of a row of more than `rank` candidates, and the next one."""
    low = high = 0.0
    if rank == 1:
        c = lowest(row)
        row ^= bit[c]
        low = reduced[c]
        c = lowest(row)
        row ^= bit[c]
        high = reduced[c]
        if high < low:
            low, high = high, low
        while row:
            c = lowest(row)
            row ^= bit[c]
            v = reduced[c]
            if v < high:
                if v < low:
                    low, high = v, low
                else:
                    high = v
        return low, high
    for _ in range(rank + 1):
        low = high
        smallest = lowest(row)
        rest = row
        while rest:
            c = lowest(rest)
            rest ^= bit[c]
            if reduced[c] < reduced[smallest]:
                smallest = c
        row ^= bit[smallest]
        high = reduced[smallest]
    return low, high


def branching_unit(rows: Any, cols: Any, cost: Any, need: Any, bit: Any, elements: Any, units: Any) -> Any:
    """Return the candidate to branch on: of an element with fewest candidates the one that covers most per cost.

    -1 says that an element has fewer candidates than it needs.
    """
    narrow, fewest = -1, 0
    rest = elements
    while rest:
        e = lowest(rest)
        rest ^= bit[e]
        count = size(rows[e] & units) - need[e]
        if narrow < 0 or count < fewest:
            narrow, fewest = e, count
    best, best_count, best_cost = -1, 0, 0.0
    if fewest < 0:
        return best
    rest = rows[narrow] & units
    while rest:
        c = lowest(rest)
        rest ^= bit[c]
        count = size(cols[c] & elements)
        if best < 0 or count * best_cost > best_count * cost[c]:
            best, best_count, best_cost = c, count, cost[c]
    return best


def accept(state: Any, choice: Any, value: float) -> None:
    """Make a cover the incumbent if its value is still of interest; from now on only better ones are."""
    masks, numbers, _ = state
    if value <= numbers[LIMIT]:
        masks[BEST_CHOICE] = choice
        numbers[BEST] = value
        step = numbers[STEP]
        numbers[LIMIT] = value - step * (1.0 - 1e-9) if step > 0.0 else value * (1.0 - 1e-12)


def push(
    stack: Any, state: Any, price: Any, need: Any, elements: Any, units: Any, choice: Any, spent: float, bound: float
) -> None:
    """Let a node wait."""
    masks, values, prices, needs = stack
    depth = state[2][WAITING]
    masks[depth][ELEMENTS] = elements
    masks[depth][UNITS] = units
    masks[depth][CHOICE] = choice
    values[depth][0] = spent
    values[depth][1] = bound
    for e in range(len(price)):
        prices[depth][e] = price[e]
        needs[depth][e] = need[e]
    state[2][WAITING] = depth + 1
