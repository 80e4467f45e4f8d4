"""A plan as tables for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrl_llm.planning.planned import written_mesh
from jaxrl_llm.planning.topologies import GIB


def tables(result: Mapping[str, Any]) -> list[tuple[str, Sequence[dict[str, str]]]]:
    """(title, rows) for people."""
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
        f"{result['method']}; of each device, for one step"
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
                f"programs; a device has {size(result['device_bytes'])}",
                [
                    {
                        "program": each["program"],
                        "memory": size(each["memory_bytes"]),
                        "state": size(each["state_bytes"]),
                        "temporaries": size(each["temporary_bytes"]),
                        "fits": "yes" if each["fits"] else "NO",
                        "compiled in": "refused" if each["refused"] else f"{each['compile_seconds']:.0f} s",
                        "kernels": ", ".join(sorted(each["kernels"])),
                    }
                    for each in result["programs"]
                ],
            )
        )
    fullest = max(result["phases"], key=lambda each: each["memory_bytes"])
    shown.append(
        (
            f"what takes most memory in {fullest['phase']}",
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
                "would make it fit, by estimates" if result["suggestions"][0]["fits"] else "would help",
                [{"change": each["change"], "memory": size(each["memory_bytes"])} for each in result["suggestions"]],
            )
        )
    return [(name, rows) for name, rows in shown if rows]


def _short(origin: str) -> str:
    """The path of an instruction without what every path has in it."""
    left_out = {"while", "body", "closed_call", "checkpoint"}
    return "/".join(part for part in origin.split("/")[1:] if part not in left_out)
