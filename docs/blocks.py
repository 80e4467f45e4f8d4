"""Blocks of plain-text formulas as Markdown: fences of LaTeX, tables of named choices, and lines with formulas in."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from formula_items import Item, joined
from formulas import items, latex

WIDE = 80  # characters of plain text from which a line of several statements is broken
REMARK = 44  # characters up to which a remark stands beside its formula rather than below
# Words between brackets that are no arguments: something other than an operator stands before.
ASIDE = re.compile(r"(?:^|(?<=[\w,;:] ))\((?=[^()]*[A-Za-z]{3})((?:(?! - )[^()+*/=<>^|])*)\)")


class Cell(NamedTuple):
    """A piece of a line that two or more spaces set apart, and where it starts."""

    start: int
    text: str


def cells(line: str) -> list[Cell]:
    """The columns of a line; two statements on one line (`a = 1,   b = 2`) are one column."""
    found: list[Cell] = []
    for match in re.finditer(r"\S+(?: \S+)*", line):
        if found and found[-1].text[-1] in ",;:":
            gap = " " if found[-1].text[-1] == ":" else "   "
            found[-1] = Cell(found[-1].start, found[-1].text + gap + match[0])
        else:
            found.append(Cell(match.start(), match[0]))
    return found


def table(block: str) -> list[list[str]]:
    """A block as rows of columns; "" where a row has nothing in a column. Continued lines are joined."""
    rows: list[list[Cell]] = []
    for line in block.split("\n"):
        found = cells(line)
        last = rows[-1][-1] if rows else None
        if last is not None and found[0].start > rows[0][0].start and len(found) == 1:
            aligned = found[0].start in {cell.start for cell in rows[-1]}
            where = rows[-1].index(next(c for c in rows[-1] if c.start == found[0].start)) if aligned else -1
            gap = "   " if rows[-1][where].text[-1] in ",;" else " "
            rows[-1][where] = Cell(rows[-1][where].start, rows[-1][where].text + gap + found[0].text)
        else:
            rows.append(found)
    starts = sorted({row[0].start for row in rows} | {cell.start for row in rows if len(row) > 1 for cell in row})
    # Remarks start where the formula before them ends: columns are those that rows share, and what is left is the last.
    shared = [s for s in starts if s == starts[0] or sum(s in {c.start for c in row} for row in rows) > 1]
    if len(rows) == 1 or any(cell.start not in shared for row in rows for cell in row):
        return [[cell.text for cell in row] for row in rows]
    return [[next((c.text for c in row if c.start == s), "") for s in shared] for row in rows]


def markdown(block: str, code: Collection[str] = ()) -> str:
    """A block of formulas as Markdown: a fence of LaTeX, or a table where each line has a name in front."""
    rows = table(block)
    if len(rows) > 1 and all(len(row) > 1 for row in rows) and all(_is_label(row[0]) for row in rows):
        return _named_rows(rows, code)
    remarks = [row[1] if len(row) > 1 else "" for row in rows]
    if any(len(row) > 2 for row in rows):
        raise ValueError(f"a block of formulas has more than a formula and a remark in a line:\n{block}")
    formulas = [row[0] for row in rows]
    if len(rows) > 1 and all(remarks) and (cases := _cases_of_rows(formulas, remarks, code)):
        return _fence(cases)
    lines: list[str] = []
    below: list[str] = []
    for formula, remark in zip(formulas, remarks, strict=True):
        beside = ""
        if remark and len(remark) <= REMARK:
            beside = rf" \qquad {latex(remark, code)}"
        elif remark:
            told = inline(remark, code)
            below.append(f"{told[0].upper()}{told[1:]}.")
        statements = re.split(r"(?<=[,;])\s{2,}", formula)
        if len(formula) > WIDE:
            rendered = [_statement(statement, code) for statement in statements]
            rendered[-1] += beside
            lines += rendered
        else:
            lines.append(r" \qquad ".join(_statement(statement, code) for statement in statements) + beside)
    fence = _fence(lines[0] if len(lines) == 1 else _aligned(lines))
    return "\n\n".join([fence, *below])


def _is_label(text: str) -> bool:
    words = re.fullmatch(r"[A-Za-z][\w-]*(?:,? [A-Za-z][\w-]*)*(?: \(\w+\))?", text)
    return not text or (bool(words) and " = " not in text)


def _fence(body: str) -> str:
    return f"```math\n{body}\n```"


def _aligned(lines: Sequence[str]) -> str:
    related = any(_relation(line) is not None for line in lines)
    rows = []
    for line in lines:
        at = _relation(line)
        rows.append(f"& {line}" if at is None or not related else f"{line[:at]}&{line[at:]}")
    return "\\begin{aligned}\n" + " \\\\[4pt]\n".join(rows) + "\n\\end{aligned}"


def _relation(line: str) -> int | None:
    """Where the first relation outside of brackets stands in a line of LaTeX."""
    depth = 0
    for match in re.finditer(r"\\text\{[^}]*\}|\\begin|[{(\[]|[})\]]|\\leftarrow|=", line):
        if match[0] in ("=", r"\leftarrow") and depth == 0:
            return match.start()
        if match[0] == r"\begin":
            return None
        if len(match[0]) == 1 and match[0] != "=":
            depth += 1 if match[0] in "{([" else -1
    return None


def _statement(text: str, code: Collection[str]) -> str:
    """One statement, its condition behind it and its cases below each other."""
    if condition := re.fullmatch(r"((?:where|if) .+?): (.+)", text):
        return rf"{_statement(condition[2].strip(), code)} \qquad {latex(condition[1], code)}"
    left, equals, right = text.partition(" = ")
    if not equals and (parts := _cases(text.rstrip(",;"))):
        left, right = "", text
    trailing = right[-1:] if right[-1:] in (",", ";") else ""
    if (equals or right) and (parts := _cases(right.rstrip(",;"))):
        rows = [rf"\displaystyle {latex(value, code)} & {latex(condition, code)}" for value, condition in parts]
        body = r" \\[4pt] ".join(rows)
        head = f"{latex(left, code)} = " if left else ""
        return rf"{head}\begin{{cases}} {body} \end{{cases}}{trailing}"
    return latex(text, code)


def _cases(text: str) -> list[tuple[str, str]]:
    """`V where C, W where D, else U` as pairs of value and condition; empty where a text is nothing of the kind."""
    parts = _split_outside(text)
    # A comma within a condition starts no new case.
    joined_parts: list[str] = []
    for part in parts:
        if joined_parts and not re.search(r"^else |\b(where|if|elsewhere)\b", part):
            joined_parts[-1] += f", {part}"
        else:
            joined_parts.append(part)
    found = []
    for part in joined_parts:
        if match := re.fullmatch(r"else (.+)", part) or re.fullmatch(r"(.+) elsewhere", part):
            found.append((match[1], "else"))
        elif match := re.fullmatch(r"(.+?) ((?:where|if) .+)", part):
            found.append((match[1], match[2]))
        else:
            return []
    return found if len(found) > 1 else []


def _split_outside(text: str) -> list[str]:
    """Cut at the commas that stand outside of brackets."""
    parts, depth = [""], 0
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def _cases_of_rows(formulas: Sequence[str], remarks: Sequence[str], code: Collection[str]) -> str:
    """Lines that say what one thing is under different conditions; "" where they define different things."""
    parts = [formula.partition(" = ") for formula in formulas]
    names = {left for left, equals, _ in parts if equals}
    if len(names) > 1 or (names and not all(equals for _, equals, _ in parts)) or any(len(r) > REMARK for r in remarks):
        return ""
    rows = [
        rf"\displaystyle {latex(right if equals else left, code)} & {latex(remark, code)}"
        for (left, equals, right), remark in zip(parts, remarks, strict=True)
    ]
    head = f"{latex(names.pop(), code)} = " if names else ""
    return head + r"\begin{cases} " + r" \\[4pt] ".join(rows) + r" \end{cases}"


def _named_rows(rows: Sequence[Sequence[str]], code: Collection[str]) -> str:
    """Choices of a hyper-parameter, each with its formula, as a table; formulas stand in the lines."""
    width = max(map(len, rows))
    columns = list(zip(*([*row, *[""] * (width - len(row))] for row in rows), strict=True))
    made = []
    for column in columns:
        # A column of names alone holds the values of a hyper-parameter.
        named = all(re.fullmatch(r"[A-Za-z]\w+|", cell) for cell in column) or column == columns[0]
        made.append([_label(cell) if named else inline(cell, code) for cell in column])
    return markdown_table([""] * width, list(zip(*made, strict=True)))


def _label(text: str) -> str:
    if re.fullmatch(r"\w{2,}(?:, \w{2,})*", text):
        return ", ".join(f"`{name}`" for name in text.split(", "))
    return inline(text) if len(text) == 1 else escaped(text)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line).replace("  ", " ") + " |" for line in lines)


def inline(text: str, code: Collection[str] = ()) -> str:
    """A line of words and formulas as Markdown, formulas between $` and `$."""
    parts = []
    if (aside := ASIDE.search(text)) is not None:
        before, after = text[: aside.start()], text[aside.end() :]
        around = [inline(part.strip(), code) if part.strip() else "" for part in (before, after)]
        space = " " if after.startswith(" ") else ""
        return f"{around[0]} ({inline(aside[1], code)}){space}{around[1]}".strip()
    for statement in re.split(r"(?<=[,;])\s{2,}", text):
        parts.append(_inline_runs(items(statement, code)))
    return " ".join(parts)


def _inline_runs(pieces: list[Item]) -> str:
    runs: list[tuple[bool, list[Item]]] = []
    for number, item in enumerate(pieces):
        formula = _is_formula(pieces, number)
        if runs and runs[-1][0] == formula:
            runs[-1][1].append(item)
        else:
            runs.append((formula, [item]))
    text = ""
    for formula, run in runs:
        if formula:
            piece = _as_formula(run)
            text += (" " if run[0].spaced and text else "") + piece
        else:
            for item in run:
                mark = item.text if item.kind != "operator" else item.text.replace(r"\cdot", "*")
                glued = item.kind == "punctuation" or item.text == ":"
                text += ("" if glued or not text or not item.spaced else " ") + escaped(mark)
    return text


def _is_formula(pieces: Sequence[Item], number: int) -> bool:
    item = pieces[number]
    before = pieces[number - 1] if number else None
    after = pieces[number + 1] if number + 1 < len(pieces) else None
    beside = [piece for piece in (before, after) if piece is not None]
    if item.kind == "prose":
        operand = any(p.kind == "operator" and p.text != ":" for p in beside)
        operand = operand or (before is not None and before.kind == "prefix")
        return operand and " " not in item.text and item.text not in ("where", "if", "else", "and", "or")
    if item.kind == "punctuation":
        return False
    return not (item.kind == "operator" and item.text == ":")


def _as_formula(run: list[Item]) -> str:
    body = joined(run)
    if re.fullmatch(r"-? ?\d+(?:\.\d+)?", body):
        return body.replace(" ", "")
    if name := re.fullmatch(r"\\mathtt\{((?:\\_|\w)+)\}", body):
        return f"`{name[1].replace(chr(92), '')}`"
    return f"$`{body.replace(chr(92) + 'frac', chr(92) + 'dfrac')}`$"


def escaped(text: str) -> str:
    """Plain text as Markdown that shows it as it is; what stands between backticks is left alone."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(
        part if part.startswith("`") else re.sub(r"([\\*_|])", r"\\\1", part).replace("<", "&lt;") for part in parts
    )
