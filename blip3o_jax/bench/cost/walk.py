"""Predict the cost and time of a compiled program: a walk over its scheduled HLO.

    matrix operations   max(FLOPs / peak, bytes / HBM rate, cycles / clock): cycles of the
                        compiler's schedule (bundles.py), or else its earlier estimate
    kernels             the same, with cycles counted in such schedules once (kernels.py)
    everything else     bytes / HBM rate
    collectives         network.py
    loops               their body's cost times their iterations
    conditionals        each branch as often as its loop takes it (branches.py), or the costliest

Operations are in the order of the schedule. Clocks run in parallel: the core's, the interconnect's,
that of copies between HBM and the core's memory, and those of copies to and from the host. An
operation in a start/done pair runs on its clock from its start; at its done the core waits for the
rest, and only this wait is exposed. An operation of no class above is charged for its bytes and
reported by name.
"""

import collections
import re
from collections.abc import Mapping

from blip3o_jax.bench.cost import hlo
from blip3o_jax.bench.cost.branches import fractions as branch_fractions
from blip3o_jax.bench.cost.bundles import Schedules
from blip3o_jax.bench.cost.cost import Collective, Cost, Traffic
from blip3o_jax.bench.cost.device_groups import device_pairs, replica_groups
from blip3o_jax.bench.cost.hlo import Computation, Op, Program
from blip3o_jax.bench.cost.hlo_bytes import operation_bytes
from blip3o_jax.bench.cost.hlo_flops import MATRIX, matrix_flops
from blip3o_jax.bench.cost.kernels import kernel_work
from blip3o_jax.bench.cost.network import COLLECTIVES, Network
from blip3o_jax.bench.cost.operation_classes import FREE, FREE_CALLS, MEMORY, MEMORY_CALLS
from blip3o_jax.bench.cost.trip_counts import trip_count
from blip3o_jax.blip3o import MODEL_PARTS

SCOPES = (*MODEL_PARTS, "prefill", "decode", "cross_entropy", "optimizer")


def program_cost(
    program: Program | str, network: Network, bundles: Mapping[str, int] | None = None
) -> Cost:
    """Return the cost of a compiled program, or of one whose HLO's text is given; `bundles` of its
    operations as bundles.py reads them.
    """
    program = hlo.parse(program) if isinstance(program, str) else program
    return _Walk(program, network, bundles or {}).computation(program.computations[program.entry])


def scope(op_name: str) -> tuple[str, str]:
    """Return (part, pass) of an operation: "jit(step)/transpose(jvp(ar))/while/body/dot_general" is
    ar's backward pass.
    """
    words = re.findall(r"[\w.\-]+", op_name)
    part = next((word for word in reversed(words) if word in SCOPES), "other")
    if "rematted_computation" in op_name:
        return part, "recomputed"
    return part, "backward" if "transpose(" in op_name else "forward"


def _target(op: Op) -> str:
    """Return the target of a custom call, else ""."""
    return (
        (op.attribute("custom_call_target") or "").strip('"') if op.opcode == "custom-call" else ""
    )


class _Walk:
    def __init__(self, program: Program, network: Network, bundles: Mapping[str, int]):
        self.program = program
        self.network = network
        self.chip = network.chip
        self.schedules = Schedules(program, bundles, network.chip.cores)
        self.costs: dict[str, Cost] = {}

    def computation(self, computation: Computation) -> Cost:
        if computation.name not in self.costs:
            schedule = _Schedule(self, computation)
            for op in computation.ops:
                schedule.run(op)
            self.costs[computation.name] = schedule.finish()
        return self.costs[computation.name]

    def named(self, name: str) -> Computation:
        return self.program.computations[name]

    def flops(
        self, computation: Computation, op: Op, op_name: str = ""
    ) -> dict[tuple[str, str], float]:
        """Return the FLOPs of an operation and all it calls, by part and pass."""
        found: dict[tuple[str, str], float] = collections.defaultdict(float)
        if op.opcode in MATRIX:
            found[scope(op.op_name or op_name)] += matrix_flops(computation, op)
        elif op.opcode in ("fusion", "call", "async-start"):
            for name in op.called("calls", "to_apply"):
                inner = self.named(name)
                for child in inner.ops:
                    for key, value in self.flops(inner, child, op.op_name or op_name).items():
                        found[key] += value
        return found

    def collective_in(self, op: Op) -> tuple[str, Op, Computation] | None:
        """Return (kind, operation, its computation) of the collective inside a fusion or an
        asynchronous call, None if it contains none.

        The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
        """
        for name in (
            op.called("calls", "to_apply") if op.opcode in ("fusion", "async-start", "call") else ()
        ):
            inner = self.named(name)
            for child in inner.ops:
                kind = child.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    scatter = kind == "all-reduce" and "all-reduce-scatter" in name
                    return "reduce-scatter" if scatter else kind, child, inner
                if deeper := self.collective_in(child):
                    return deeper
        return None

    def chain(self, op: Op) -> tuple[str, str]:
        """Return (name, "start", "under way" or "end") of the chain of fusions over which a
        collective is spread, which the TPU compiler calls an asynchronous collective fusion; ("",
        "") for a collective in one operation."""
        inside = self.collective_in(op) if op.opcode == "fusion" else None
        if inside is None:
            return "", ""
        found = re.search(r'chain_id="(\w+)"', inside[1].attributes)
        if not found:
            return "", ""
        targets = {_target(child) for child in inside[2].ops}
        stage = (
            "start"
            if "AsyncCollectiveStart" in targets
            else "end"
            if "AsyncCollectiveDone" in targets
            else "under way"
        )
        return f"chain {found[1]}", stage


class _Schedule:
    """Schedule the operations of one computation in turn on the three clocks."""

    def __init__(self, walk: _Walk, computation: Computation):
        self.walk = walk
        self.of = computation
        self.cost = Cost()
        self.now = 0.0
        self.free: dict[str, float] = collections.defaultdict(float)  # when a clock is free again
        self.pending: dict[
            str, tuple[str, float, Traffic | None]
        ] = {}  # start -> (limiter, end, traffic)

    def run(self, op: Op) -> None:
        opcode = op.opcode
        if opcode in FREE or _target(op) in FREE_CALLS:
            return
        if opcode.endswith("-done"):
            self._done(op)
        elif opcode == "while":
            self._loop(op)
        elif opcode == "conditional":
            branches = op.called("true_computation", "false_computation", "branch_computations")
            costs = [self.walk.computation(self.walk.named(name)) for name in branches]
            fractions = branch_fractions(self.walk.program, self.of, op)
            if fractions is None:
                self._add(max(costs, key=lambda cost: cost.total_seconds))
            else:
                for cost, fraction in zip(costs, fractions, strict=True):
                    self._add(cost, fraction)
        elif opcode == "call":
            self._add(self.walk.computation(self.walk.named(op.called("to_apply")[0])))
        elif self._is_collective(op):
            self._collective_stage(op)
        elif opcode.endswith("-start"):
            self._copy(op)
        else:
            self._compute(op)

    def finish(self) -> Cost:
        """Wait for what nothing in this computation has waited for."""
        for start in list(self.pending):
            self._wait(start)
        return self.cost

    # --- work of the core

    def _compute(self, op: Op) -> None:
        chip, part = self.walk.chip, scope(op.op_name)[0]
        size = operation_bytes(self.walk.program, self.of, op)
        flops = self.walk.flops(self.of, op)
        known = bool(flops) or op.opcode in MEMORY or op.opcode == "fusion"
        # The compiler's schedule, where it was dumped, is nearer to the truth than its estimate.
        cycles = (self.walk.schedules.cycles(op) or op.estimated_cycles) if flops else 0
        if op.opcode == "custom-call":
            kernel = kernel_work(self.of, op, chip)
            known = kernel is not None or _target(op) in MEMORY_CALLS
            if kernel:
                flops, cycles = {scope(op.op_name): kernel.flops}, kernel.cycles
        moving = size / chip.hbm_rate
        working = sum(flops.values()) / chip.flops
        if chip.clock:
            working = max(working, cycles / chip.clock)
        for key, value in flops.items():
            self.cost.flops[key] += value
        if flops:  # a fusion goes by the name of its last operation, its work is the product's
            part = max(flops, key=flops.__getitem__)[0]
        self.cost.hbm_bytes += size
        self._spend("compute" if working > moving else "HBM", max(working, moving), part)
        if not known:
            self._note(f"{op.opcode} {_target(op)}".strip(), size, max(working, moving))

    def _note(self, name: str, size: float, seconds: float) -> None:
        entry = self.cost.unknown[name]
        entry.count += 1
        entry.size += size
        entry.seconds += seconds

    def _spend(self, limiter: str, seconds: float, part: str) -> None:
        self.now += seconds
        self.cost.seconds[limiter] += seconds
        self.cost.part_seconds[part] += seconds

    def _add(self, cost: Cost, times: float = 1) -> None:
        self.cost.add(cost, times)
        self.now += cost.total_seconds * times

    def _loop(self, op: Op) -> None:
        iterations = trip_count(self.walk.program, self.of, op)
        body = self.walk.computation(self.walk.named(op.called("body")[0]))
        if (
            iterations is None
        ):  # its time is not known at all: that of one turn, less what the body notes itself
            iterations, seconds = 1, body.total_seconds * (1 - body.unknown_fraction)
            self._note("loop of unknown length, counted once", body.hbm_bytes, seconds)
        self._add(body, iterations)

    # --- collectives and copies

    def _is_collective(self, op: Op) -> bool:
        return (
            op.opcode.removesuffix("-start") in COLLECTIVES
            or op.opcode in ("send", "recv")
            or self.walk.collective_in(op) is not None
        )

    def _collective_stage(self, op: Op) -> None:
        """Charge a collective, or a stage of one that overlaps several fusions: these share a
        chain's number, the first fusion contains its start, the last its end, and those between
        compute meanwhile."""
        chain, stage = self.walk.chain(op)
        if stage == "under way":
            self._compute(op)
        elif stage == "end":
            if chain in self.pending:
                self._wait(chain, scope(op.op_name)[0])
        else:
            self._collective(op, chain if stage == "start" else "")

    def _collective(self, op: Op, chain: str) -> None:
        """Charge a collective; `chain`: the key by which its end finds it, where that is a
        separate operation."""
        if op.opcode == "recv":  # its bytes are counted where they are sent, which is as many
            return
        key, size, seconds = self._traffic(op)
        traffic = self.cost.collectives[key]
        traffic.count += 1
        traffic.size += size
        traffic.seconds += seconds
        flops = self.walk.flops(self.of, op)
        for name, value in flops.items():
            self.cost.flops[name] += value
        # A network carries one collective at a time, in the order of their starts.
        begin = max(self.now, self.free[key[2]])
        self.free[key[2]] = begin + seconds
        self.pending[chain or op.name] = key[2], begin + seconds, traffic
        # A collective within a fusion overlaps with the product in it.
        working = sum(flops.values()) / self.walk.chip.flops
        if working:
            self._spend("compute", working, scope(op.op_name)[0])
        if not chain and not op.opcode.endswith("-start") and op.opcode != "send":
            self._wait(op.name, scope(op.op_name)[0])

    def _traffic(self, op: Op) -> tuple[Collective, float, float]:
        """Return (key, bytes, seconds) of a collective in any of its forms."""
        network, inside = self.walk.network, self.walk.collective_in(op)
        kind, inner, of = inside or (op.opcode.removesuffix("-start"), op, self.of)
        operands = sum(
            s.bytes for name in inner.operands for s in hlo.leaves(of.by_name[name].shape)
        )
        if kind == "send":
            found = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)
            kind = found[1].lower().replace("_", "-") if found else kind
            return (
                (kind, network.slice_axes, "DCN"),
                operands,
                network.transfer_seconds(kind, operands),
            )
        if kind == "collective-permute":
            pairs = device_pairs(inner.attribute("source_target_pairs") or "")
            axes = network.axes(pairs[0]) if pairs else ()
            crossing = "DCN" if network.crosses_pairs(pairs) else "ICI"
            return (kind, axes, crossing), operands, network.permute_seconds(operands, pairs)
        groups = replica_groups(inner.replica_groups, network.devices)
        # Of a gather the operand is one device's part, and the size that of the whole array.
        size = operands * len(groups[0]) if kind == "all-gather" else operands
        crossing = "DCN" if network.crosses(groups[0]) else "ICI"
        return (
            (kind, network.axes(groups[0]), crossing),
            size,
            network.seconds(kind, size, groups[0]),
        )

    def _copy(self, op: Op) -> None:
        """Charge a copy between memories: one side of it is HBM, the other the core's or the
        host's."""
        size, chip = operation_bytes(self.walk.program, self.of, op), self.walk.chip
        self.cost.hbm_bytes += size
        limiter, clock, rate = "HBM", "DMA", chip.hbm_rate
        if any(leaf.space == hlo.HOST for leaf in hlo.leaves(op.shape)):
            target = hlo.array(hlo.element(op.shape, 0 if op.opcode == "copy-start" else 1))
            limiter, clock, rate = "host", f"host {target.space == hlo.HOST}", chip.host_rate
        begin = max(self.now, self.free[clock])
        self.free[clock] = end = begin + size / rate
        self.pending[op.name] = limiter, end, None

    def _done(self, op: Op) -> None:
        name = op.operands[0]
        # A done may refer to its start through tuples and their elements.
        while (
            name not in self.pending and name in self.of.by_name and self.of.by_name[name].operands
        ):
            name = self.of.by_name[name].operands[0]
        if name in self.pending:
            self._wait(name, scope(op.op_name)[0])

    def _wait(self, start: str, part: str = "other") -> None:
        limiter, end, traffic = self.pending.pop(start)
        waited = max(0.0, end - self.now)
        if waited:
            self._spend(limiter, waited, part)
        if traffic is not None:
            traffic.exposed += waited
