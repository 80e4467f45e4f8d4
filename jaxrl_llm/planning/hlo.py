"""Analysis of the text of a compiled program: operations, memory traffic and communication of one device.

XLA's own cost model counts the body of a loop once; here it is multiplied by its iterations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from jaxrl_llm.planning.instruction_costs import flops, sent_bytes, traffic
from jaxrl_llm.planning.program_text import COLLECTIVES, Instruction, Program, branches, channel, fed

# Instructions without memory traffic: aliases, constants, and calls whose bodies are counted.
_FREE = frozenset(
    [
        *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota"),
        *("async-done", "async-update", "copy-done", "slice-done", "partition-id", "replica-id", "after-all"),
        *("opt-barrier", "domain", "add-dependency"),
    ]
)


@dataclass
class Cost:
    """The cost on one device.

    Attributes:
      flops: operations of matrix products and attention kernels.
      bytes: read from and written to the large memory.
      collectives: bytes that the device sends, by kind of collective.
      seconds_on_network: for all of them, one after the other.
      kernels: names of custom kernels with their numbers of runs.
    """

    flops: float = 0.0
    bytes: float = 0.0
    collectives: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    seconds_on_network: float = 0.0
    kernels: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def costs(
    program: Program,
    phases: Sequence[str] = (),
    *,
    steps: Mapping[str, Sequence[int]] | None = None,
    network: Callable[[Sequence[Sequence[int]]], float] | None = None,
) -> tuple[dict[str, Cost], dict[str, str]]:
    """(cost of each phase of a program on one device, phase of each instruction by name).

    Args:
      program: parsed.
      phases: names of scopes; an instruction belongs to the first of them in the path of its origin, or to the phase of
        its caller. All others belong to "other".
      steps: iterations of the data-dependent loops of a phase, in order; the last number applies to all further loops.
        Default 1.
      network: groups of devices -> bytes per second that each can send.
    """
    result: dict[str, Cost] = defaultdict(Cost)
    belongs: dict[str, str] = {}
    left = {name: list(counts) for name, counts in (steps or {}).items()}

    def depends_on_data(phase: str) -> int:
        counts = left.get(phase, [1])
        return counts.pop(0) if len(counts) > 1 else counts[0]

    def named(one: Instruction) -> str | None:
        path = one.origin.split("/")
        return next((name for name in phases if name in path), None)

    def all_inside(computation: str) -> set[str]:
        """Phases of all instructions inside a loop."""
        found = set()
        for one in program.computations.get(computation, ()):
            if (name := named(one)) is not None:
                found.add(name)
            elif one.op == "while":
                found |= all_inside(one.called("body") or "")
        return found

    def walk(computation: str, factor: float, inherited: str) -> None:
        for one in program.computations.get(computation, ()):
            phase = named(one) or inherited
            if one.op == "while" and phase == "other" and len(inside := all_inside(one.called("body") or "")) == 1:
                phase = inside.pop()  # a loop over pieces, around a phase
            belongs[one.name] = phase
            if one.op == "while":
                trips = program.trips(one)
                factor_inside = factor * (depends_on_data(phase) if trips is None else trips)
                walk(one.called("body") or "", factor_inside, phase)
            elif one.op == "conditional":
                found = branches(one)
                for branch in found:
                    walk(branch, factor / len(found), phase)
            elif one.op == "call":
                walk(one.called("to_apply") or "", factor, phase)
            else:
                add_cost(result[phase], program, computation, one, factor, network)

    walk(program.entry, 1.0, "other")
    return dict(result), belongs


def add_cost(total: Cost, program: Program, computation: str, one: Instruction, factor: float, network) -> None:
    """Add the cost of one instruction, including instructions fused into it."""
    for each, names, body in _with_fused(program, computation, one):
        total.flops += factor * flops(each, names)
        kind = each.op.removesuffix("-start")
        if kind in COLLECTIVES and (channel(each) not in program.started or _starts(each, body)):
            sent, groups = sent_bytes(each, program.devices)
            total.collectives[kind] += factor * sent
            if network is not None and sent:
                total.seconds_on_network += factor * sent / network(groups)
        if 'custom_call_target="tpu_custom_call"' in each.attributes:
            total.kernels[_kernel(each)] += factor
    if one.op not in _FREE:
        total.bytes += factor * traffic(program, program.names[computation], one)


def _with_fused(
    program: Program, computation: str, one: Instruction
) -> Iterator[tuple[Instruction, Mapping, Sequence]]:
    """An instruction and those fused into it, each with the instructions beside it by name, and in order."""
    yield one, program.names[computation], program.computations[computation]
    inside = one.called("calls") or ""
    for each in program.computations.get(inside, ()):
        yield from _with_fused(program, inside, each)


def _starts(one: Instruction, body: Sequence[Instruction]) -> bool:
    return one.name in fed(body, "AsyncCollectiveStart")


def _kernel(one: Instruction) -> str:
    names = [name for name in one.origin.split("/") if name != "pallas_call"]
    return names[-1] if names else one.name
