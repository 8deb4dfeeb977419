"""Edge selection as a flow: repair of a selection within a core of undecided edges, and what makes bounds conflict.

Nodes are the rows, the columns, a hub that deals k edges out to the rows and one that collects them from the
columns. A selection is a flow from hub to hub; where it breaks a bound, nodes have an excess or a deficit. The
residual network of the core edges (a kept edge can be given up, another one taken) carries the excess to the deficits:
any way is valid (maximum flow), the cheapest one is optimal within the core (minimum-cost flow).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from topoprune_solvers.edges.common import column_limits, row_limits
from topoprune_solvers.problems import EdgeSelection

__all__ = ["CoreNetwork", "conflict", "flow_scale"]

SHOWN = 6  # lines named in a message


def flow_scale(score: np.ndarray, units: int) -> tuple[float, int]:
    """Return the largest score and the integer it becomes: sums over `units` and the flow's own scaling fit 64 bits."""
    return float(score.max(initial=0.0)) or 1.0, min(2**40, 2**61 // max(units, 1))


@dataclass(frozen=True, eq=False)
class CoreNetwork:
    """Residual network of a selection, restricted to a core of edges that may change.

    Args:
        problem: k and degree bounds; attachment is ignored.
        mask: (n_rows, n_cols) bool, the selection to repair; it may break k and bounds.
        core: (e,) int64 flat indices of the edges that may change, ascending.
    """

    problem: EdgeSelection
    mask: np.ndarray
    core: np.ndarray

    def arcs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return tails, heads, capacities of the arcs (core edges first), and the excess of each node."""
        problem = self.problem
        rows, cols = problem.shape
        deal, collect = rows + cols, rows + cols + 1
        row_node, col_node = np.arange(rows), rows + np.arange(cols)
        row_low, row_high = row_limits(problem)
        col_low, col_high = column_limits(problem)
        row_degree, col_degree = (np.count_nonzero(self.mask, axis=axis) for axis in (1, 0))
        row_flow, col_flow = np.clip(row_degree, row_low, row_high), np.clip(col_degree, col_low, col_high)
        row, col = np.divmod(self.core, cols)
        kept = self.mask.reshape(-1)[self.core]
        tail, head = np.where(kept, rows + col, row), np.where(kept, row, rows + col)
        tails = [tail, np.full(rows, deal), row_node, col_node, np.full(cols, collect)]
        heads = [head, row_node, np.full(rows, deal), np.full(cols, collect), col_node]
        capacities = [
            np.ones(self.core.size, dtype=np.int64),
            row_high - row_flow,
            row_flow - row_low,
            col_high - col_flow,
            col_flow - col_low,
        ]
        hubs = [problem.k - row_flow.sum(), col_flow.sum() - problem.k]
        excess = np.concatenate([row_flow - row_degree, col_degree - col_flow, hubs])
        return np.concatenate(tails), np.concatenate(heads), np.concatenate(capacities), excess

    def flipped(self, flow: np.ndarray) -> np.ndarray:
        """Return the mask with the core edges that carry flow flipped."""
        mask = self.mask.copy()
        mask.reshape(-1)[self.core[flow > 0]] ^= True
        return mask

    def repaired(self) -> np.ndarray | None:
        """Return a valid mask near the given one, by maximum flow (scipy), or None if the core does not allow one."""
        flow, total, asked, _ = self._maximum_flow()
        return self.flipped(flow[: self.core.size]) if total == asked else None

    def _maximum_flow(self) -> tuple[np.ndarray, int, int, np.ndarray]:
        # Flow on every arc, its value, the value that repairs everything, the nodes on the source's side of a cut.
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow

        tail, head, capacity, excess = self.arcs()
        source, sink = excess.size, excess.size + 1
        giving, taking = np.flatnonzero(excess > 0), np.flatnonzero(excess < 0)
        tail = np.concatenate([tail, np.full(giving.size, source), taking])
        head = np.concatenate([head, giving, np.full(taking.size, sink)])
        capacity = np.concatenate([capacity, excess[giving], -excess[taking]])
        used = capacity > 0
        shape = (sink + 1, sink + 1)
        graph = csr_array((capacity[used].astype(np.int32), (tail[used], head[used])), shape=shape)
        result = maximum_flow(graph, source, sink)
        net = csr_array(result.flow)
        # Opposite arcs between the same nodes show their net flow; core edges have one direction each.
        flow = np.asarray(net[tail[: self.core.size], head[: self.core.size]]).reshape(-1)
        residual = csr_array(graph - net)
        residual.data = np.maximum(residual.data, 0)
        residual.eliminate_zeros()
        reached = np.zeros(sink + 1, dtype=bool)
        reached[breadth_first_order(residual, source, return_predecessors=False)] = True
        return flow, int(result.flow_value), int(excess[giving].sum()), reached

    def cheapest(self) -> np.ndarray | None:
        """Return the mask of highest score that differs from the given one in the core only (OR-Tools), or None."""
        from ortools.graph.python import min_cost_flow

        tail, head, capacity, excess = self.arcs()
        score = self.problem.score.reshape(-1)[self.core]
        largest, steps = flow_scale(score, max(self.problem.k, excess.size))
        value = np.rint(score / largest * steps).astype(np.int64)
        cost = np.zeros(tail.size, dtype=np.int64)
        cost[: self.core.size] = np.where(self.mask.reshape(-1)[self.core], value, -value)
        solver = min_cost_flow.SimpleMinCostFlow()
        arcs = solver.add_arcs_with_capacity_and_unit_cost(tail, head, capacity, cost)
        solver.set_nodes_supplies(np.arange(excess.size), excess)
        if solver.solve() != solver.OPTIMAL:
            return None
        return self.flipped(solver.flows(arcs[: self.core.size]))


def conflict(problem: EdgeSelection) -> str:
    """Return a sentence naming the bounds of an infeasible problem that contradict each other, by a minimum cut.

    Hoffman's circulation theorem: bounds conflict iff some set of nodes must receive more than can leave it.
    """
    rows, cols = problem.shape
    nothing = np.zeros(problem.shape, dtype=bool)
    allowed = np.ones(problem.shape, dtype=bool) if problem.allowed is None else problem.allowed
    network = CoreNetwork(problem, nothing, np.flatnonzero(allowed.reshape(-1)))
    *_, reached = network._maximum_flow()
    row, col = reached[:rows], reached[rows : rows + cols]
    deal, collect = bool(reached[rows + cols]), bool(reached[rows + cols + 1])
    (row_low, row_high), (col_low, col_high) = row_limits(problem), column_limits(problem)
    need: list[tuple[str, int]] = []
    room: list[tuple[str, int]] = []
    if deal:
        room.append((f"at most {{}} in {_lines('row', ~row)}", int(row_high[~row].sum())))
    else:
        need.append((f"at least {{}} in {_lines('row', row)}", int(row_low[row].sum())))
    if collect:
        need.append((f"at least {{}} in {_lines('column', ~col)}", int(col_low[~col].sum())))
    else:
        room.append((f"at most {{}} in {_lines('column', col)}", int(col_high[col].sum())))
    crossing = int(np.count_nonzero(allowed[row][:, ~col]))
    room.append((f"{{}} where {_lines('row', row)} and {_lines('column', ~col)} meet", crossing))
    if deal and not collect:
        need.append(("exactly {} in all", problem.k))
    elif collect and not deal:
        room.append(("exactly {} in all", problem.k))
    return f"{_sum(need)} must be kept, but there is room for {_sum(room)}"


def _sum(parts: list[tuple[str, int]]) -> str:
    counted = [text.format(count) for text, count in parts if count]
    return " plus ".join(counted) if counted else "no edge"


def _lines(side: str, chosen: np.ndarray) -> str:
    index = np.flatnonzero(chosen).tolist()
    if len(index) == chosen.size:
        return f"all {side}s"
    shown = ", ".join(map(str, index[:SHOWN])) + (", …" if len(index) > SHOWN else "")
    return f"{side} {shown}" if len(index) == 1 else f"{len(index)} {side}s ({shown})"
