"""Tables of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.planning.planned import written_mesh
from jaxrl_llm.planning.topologies import GIB


def tables(result: Mapping[str, Any]) -> list[tuple[str, Sequence[dict[str, str]]]]:
    """(title, rows) of each table."""
    size = lambda number: f"{number / GIB:.2f} GiB"  # noqa: E731
    phases = [
        {
            "phase": each["phase"],
            "memory": size(each["memory_bytes"]),
            "TFLOP": f"{each['flops'] / 1e12:,.1f}",
            "traffic GB": f"{each['bytes'] / 1e9:,.0f}",
            "sent GB": f"{sum(each['collectives'].values()) / 1e9:,.1f}",
            "of it": ", ".join(
                f"{kind} {sent / 1e9:,.1f}" for kind, sent in sorted(each["collectives"].items()) if sent >= 5e7
            ),
            "seconds": f"{each['seconds']:,.2f}",
            "bound by": each["bound"],
        }
        for each in result["phases"]
    ]
    title = (
        f"{result['config']} on {result['topology']} ({result['machine']}), mesh {written_mesh(result['mesh'])}: "
        f"{result['method']}; of each device, for one step; memory: peak of the phase"
    )
    shown: list[tuple[str, Sequence[dict[str, str]]]] = []
    if result["layouts"]:
        shown.append(
            (
                "layouts, by estimates",
                [
                    {
                        "mesh": written_mesh(each["mesh"]),
                        "memory": size(each["memory_bytes"]),
                        "fits": "yes" if each["fits"] else "no",
                        "seconds": f"{each['seconds']:,.1f}",
                        "bound by": ", ".join(f"{phase} {bound}" for phase, bound in each["bound"].items()),
                    }
                    for each in result["layouts"]
                ],
            )
        )
    shown.append((title, phases))
    if result["programs"]:
        shown.append(
            (
                f"memory reserved by each program, fragmentation included; of {size(result['device_bytes'])}",
                [
                    {
                        "program": each["program"],
                        "memory": size(each["memory_bytes"]),
                        "state": size(each["state_bytes"]),
                        "temporaries": size(each["temporary_bytes"]),
                        "fits": "yes" if each["fits"] else "NO",
                        "compiled in": _compiled_in(each),
                        "kernels": ", ".join(sorted(each["kernels"])),
                    }
                    for each in result["programs"]
                ],
            )
        )
    shown.append(("besides", _besides(result)))
    fullest = max(result["phases"], key=lambda each: each["memory_bytes"])
    shown.append(
        (
            f"largest memory items in {fullest['phase']}",
            [
                {
                    "size": size(each["bytes"]),
                    "what": " ".join(filter(None, [each.get("shape", ""), each["value"]])),
                    "from": _short(each.get("from", "")),
                }
                for each in fullest["largest"]
            ],
        )
    )
    if result["suggestions"]:
        shown.append(
            (
                "changes that would make it fit, by estimates" if result["suggestions"][0]["fits"] else "would help",
                [{"change": each["change"], "memory": size(each["memory_bytes"])} for each in result["suggestions"]],
            )
        )
    return [(name, rows) for name, rows in shown if rows]


def _compiled_in(program: Mapping[str, Any]) -> str:
    seconds = program["compile_seconds"]
    return "refused" if program["refused"] else "estimated" if seconds is None else f"{seconds:.0f} s"


def _besides(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Needs of a run beside its devices, and the time of a token."""
    checkpoint, host, token = result["checkpoint"], result["host"], result["token_seconds"]
    has = f" of {host['has_bytes'] / GIB:.0f}" if host["has_bytes"] else ""
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in host["memory"].items())
    rows = [
        {
            "what": "a checkpoint",
            "needs": f"{checkpoint['bytes'] / GIB:.2f} GiB, {checkpoint['host_bytes'] / GIB:.2f} of each host",
            "note": f"{checkpoint['seconds']:.1f} s at {checkpoint['rate'] / 1e9:g} GB/s a host, beside the steps",
        },
        {
            "what": f"memory of a host ({host['hosts']})",
            "needs": f"{host['memory_bytes'] / GIB:.2f}{has} GiB",
            "note": parts,
        },
    ]
    if token is not None:
        note = "of decoding, all completions of a step together, at the peak rates"
        rows.append({"what": "a token", "needs": f"{1e3 * token:.2f} ms", "note": note})
    return rows


def _short(origin: str) -> str:
    """The path of an instruction without the common parts."""
    left_out = {"while", "body", "closed_call", "checkpoint"}
    return "/".join(part for part in origin.split("/")[1:] if part not in left_out)
