"""Plain-text formulas of docstrings -> LaTeX.

    A = (r - mean_group) / (std_group + eps)

is readable in a terminal and becomes a fraction on a page. The rules: a slash between spaces is a fraction, and one
without spaces stays a slash; `_` and `^` are scripts; `|x|` is an absolute value, `p || q` the bar of a divergence;
`C(n, k)` is a binomial; words are upright; names in `code` are set in a typewriter face.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from formula_items import Item, bare, escaped, joined, number, plain, subscript, typewriter, with_prose
from formula_tokens import (
    BRACKETS,
    CLOSING,
    FUNCTIONS,
    GREEK,
    JOINING,
    LOGICAL,
    OPERATORS,
    SCRIPTED,
    UPRIGHT,
    Token,
    tokens,
)


class FormulaError(ValueError):
    """A formula that cannot be translated; the message shows it."""


def latex(text: str, code: Collection[str] = ()) -> str:
    r"""One formula as LaTeX; `code` are names to be set in a typewriter face, such as hyper-parameters.

    >>> latex("A = (r - mean_group) / (std_group + eps)")
    'A = \\frac{r - \\mathrm{mean}_{\\text{group}}}{\\mathrm{std}_{\\text{group}} + \\varepsilon}'

    Raises:
      FormulaError: for an unmatched bracket, or an operator without an operand.
    """
    return joined(items(text, code))


def items(text: str, code: Collection[str] = ()) -> list[Item]:
    """The translated pieces of a formula, in order; see `latex`."""
    reader = _Reader(text, frozenset(code))
    found = reader.sequence(frozenset())
    if reader.here is not None:
        raise FormulaError(f"formula {text!r} has a {reader.here.text!r} without its counterpart")
    return with_prose(found)


class _Reader:
    """Recursive descent over the tokens of one formula."""

    def __init__(self, text: str, code: frozenset[str]):
        self.text, self.code = text, code
        self.tokens, self.position = tokens(text), 0

    @property
    def here(self) -> Token | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def ahead(self, offset: int = 1) -> Token | None:
        at = self.position + offset
        return self.tokens[at] if 0 <= at < len(self.tokens) else None

    def take(self) -> Token:
        token = self.here
        if token is None:
            raise FormulaError(f"formula {self.text!r} ends too early")
        self.position += 1
        return token

    def sequence(self, until: frozenset[str]) -> list[Item]:
        found: list[Item] = []
        while (token := self.here) is not None and not (token.kind == "sign" and self._ends(token, until, found)):
            if token.kind == "sign" and token.text in ")]}":
                break
            if token.text == "/":
                self._division(found)
            elif token.text in "+-" and token.kind == "sign" and self._is_sign(found):
                self.take()
                found.append(Item("atom", f"{{{token.text}}}", True))
            elif token.kind == "sign" and token.text in OPERATORS:
                self.take()
                found.append(Item("operator", OPERATORS[token.text], token.spaced))
            elif token.kind == "sign" and token.text in ",;.?!" and not self._placeholder(found):
                self.take()
                found.append(Item("punctuation", token.text, token.spaced))
            elif token.text == "|" and found and found[-1].kind == "atom" and token.spaced and self._spaced_after():
                self.take()
                found.append(Item("operator", r"\mid", True))
            else:
                found.append(self.atom())
        return found

    def _ends(self, token: Token, until: frozenset[str], found: list[Item]) -> bool:
        # A bar after an operand closes; otherwise it opens a nested absolute value.
        return token.text in until and (token.text != "|" or (bool(found) and found[-1].kind != "operator"))

    def _is_sign(self, found: list[Item]) -> bool:
        """Whether + or - is unary, as in `has -1`."""
        token, after = self.here, self.ahead()
        alone = token is not None and token.spaced and after is not None and not after.spaced
        return alone and bool(found) and found[-1].kind in ("atom", "prose")

    def _opens(self) -> bool:
        return self.here is not None and self.here.text in BRACKETS

    def _spaced_after(self) -> bool:
        after = self.ahead()
        return after is not None and after.spaced

    def _placeholder(self, found: list[Item]) -> bool:
        token = self.here
        return token is not None and token.text == "." and not found

    def _division(self, found: list[Item]) -> None:
        slash = self.take()
        if not found or found[-1].kind not in ("atom", "prose"):
            raise FormulaError(f"formula {self.text!r} has a '/' without a numerator")
        over = found.pop()
        while over.kind == "prose" and found and found[-1].kind == "prose":
            above = found.pop()
            over = Item("prose", f"{above.text} {over.text}", above.spaced)
        if not slash.spaced:
            under = self.operand()
            found.append(Item("atom", f"{plain(over)} / {plain(under)}", over.spaced))
            return
        under = self.operand()
        while under.kind == "prose" and self.here is not None and self.here.kind == "word":
            token = self.take()
            under = Item("prose", f"{under.text} {token.text}", under.spaced)
        found.append(Item("atom", rf"\frac{{{bare(over)}}}{{{bare(under)}}}", over.spaced))

    def operand(self) -> Item:
        """The atom after an operator; a function without parentheses takes the next atom along, a number its letter."""
        first = self.atom()
        if first.kind == "prefix":
            return Item("atom", joined([first, self.operand()]), first.spaced)
        after = self.here
        if re.fullmatch(r"\d+", first.text) and after is not None and after.kind == "word" and not after.spaced:
            return Item("atom", first.text + self.atom().text, first.spaced)
        return first

    def atom(self) -> Item:
        token = self.take()
        if token.kind == "number":
            base = Item("atom", number(token.text), token.spaced)
        elif token.kind == "word":
            base = self.word(token)
        elif token.text in BRACKETS:
            base = Item("atom", self.bracketed(token.text), token.spaced)
        elif token.text == "#":
            counted = self.bracketed(self.take().text) if self._opens() else plain(self.atom())
            base = Item("atom", rf"\#{counted}", token.spaced)
        elif token.text == ".":
            base = Item("atom", r"\cdot", token.spaced)
        elif token.text == "`":
            words = []
            while (inner := self.take()).text != "`":
                words.append(inner.text)
            base = Item("atom", typewriter("".join(words)), token.spaced)
        else:
            raise FormulaError(f"formula {self.text!r} has {token.text!r} in an invalid place")
        return self.scripted(base)

    def bracketed(self, opening: str) -> str:
        inside = with_prose(self.sequence(frozenset({CLOSING[opening]})))
        if self.here is None or self.here.text != CLOSING[opening]:
            raise FormulaError(f"formula {self.text!r} has a {opening!r} without its counterpart")
        self.take()
        left, right = BRACKETS[opening]
        body = joined(inside)
        if re.search(r"\\(frac|sum|binom|left)\b", body):
            return rf"\left{left} {body} \right{right}"
        return f"{left}{' ' if left[-1].isalpha() else ''}{body}{' ' if right[0] == chr(92) else ''}{right}"

    def word(self, token: Token) -> Item:
        text, spaced, after = token.text, token.spaced, self.here
        called = after is not None and not after.spaced and after.text in ("(", "[")
        head, *scripts = text.split("_")
        if text.startswith("<"):
            return Item("prose", text, spaced)
        if not called and len(text) > 1 and text not in FUNCTIONS and text not in GREEK:
            before = self.ahead(-2)
            applied = before is not None and before.text in ("grad", "log", "exp")
            if text in self.code and (scripts or applied or self._operand()):
                return Item("atom", typewriter(text), spaced)
            if not scripts and self._compared():
                return Item("atom", rf"\text{{{text}}}", spaced)
        if called and text in ("C", "sqrt", "floor", "ceil"):
            return Item("atom", self._special(text), spaced)
        if text == "sqrt":
            return Item("atom", rf"\sqrt{{{self.operand().text}}}", spaced)
        if text in FUNCTIONS and not self._ends_prose():
            return Item("prefix", FUNCTIONS[text], spaced)
        if scripts and (head in SCRIPTED or len(head) == 1 or len(scripts[-1]) == 1):
            if head not in SCRIPTED and len(head) > 1 and len(scripts) > 1:
                head, scripts = "_".join([head, *scripts[:-1]]), scripts[-1:]
            base = FUNCTIONS.get(head) or self._symbol(head)
            script = ",".join(subscript(part) for part in scripts)
            operator = head in FUNCTIONS or head in UPRIGHT
            return Item("prefix" if operator and not called else "atom", f"{base}_{{{script}}}", spaced)
        if scripts and not called:
            return Item("atom", typewriter(text), spaced)
        if text in GREEK or (len(text) == 1 and not self._article()):
            return Item("atom", GREEK.get(text, text), spaced)
        if re.fullmatch(r"[A-Za-z]\d+", text):
            return Item("atom", f"{text[0]}_{{{text[1:]}}}", spaced)
        scripted = after is not None and not after.spaced and after.text == "_"
        if called or (scripted and text in UPRIGHT):
            return Item("prefix" if scripted else "atom", rf"\mathrm{{{escaped(text)}}}", spaced)
        return Item("atom", rf"\text{{{text}}}", spaced) if scripted else Item("prose", text, spaced)

    def _symbol(self, name: str) -> str:
        if name in self.code or "_" in name:
            return typewriter(name)
        if name in UPRIGHT:
            return rf"\mathrm{{{name}}}"
        return GREEK.get(name) or (name if len(name) == 1 else rf"\text{{{name}}}")

    def _operand(self) -> bool:
        """Whether the word just taken is between operators, brackets and commas, and thus a variable."""
        before, after = self.ahead(-2), self.here
        applied = before is not None and (before.text in FUNCTIONS or before.text.split("_")[0] in SCRIPTED)
        opened = before is None or (before.kind == "sign" and before.text not in ".:;)]}'`") or applied
        closed = after is None or (after.kind == "sign" and after.text not in ".:'`({[")
        return (opened and closed) or self._compared()

    def _compared(self) -> bool:
        """Whether the word just taken is between a word such as `where` or `and` and an operator, in either order."""
        before, after = self.ahead(-2), self.here
        if before is None or after is None:
            return False
        signs = OPERATORS.keys() - {":", "||"} | {"/"}
        return (before.text in LOGICAL and after.text in signs) or (before.text in signs and after.text in LOGICAL)

    def _ends_prose(self) -> bool:
        """Whether the function name just taken is a word of a sentence, as in `max of` and `where the sum is`."""
        before, after = self.ahead(-2), self.here
        told = before is not None and before.kind == "word" and len(before.text) > 1 and before.text not in SCRIPTED
        if after is not None and after.kind == "word":
            plain = len(after.text) > 1 and "_" not in after.text and after.text not in SCRIPTED
            return after.text in JOINING or (told and plain)
        return told and (after is None or after.text in ",;")

    def _article(self) -> bool:
        """Whether the letter just taken is the word `a` before another."""
        before, here, after = self.ahead(-2), self.ahead(-1), self.here
        if here is None or here.text != "a" or after is None or after.kind != "word":
            return False
        applied = before is not None and before.text in OPERATORS.keys() - {":"}
        if applied or len(after.text) == 1 or "_" in after.text:
            return False
        called = self.ahead()
        return after.text not in SCRIPTED and not (called is not None and called.text == "(" and not called.spaced)

    def _special(self, name: str) -> str:
        """The functions that LaTeX does not write as a name before parentheses."""
        self.take()
        arguments = [self.sequence(frozenset({","}))]
        while self.here is not None and self.here.text == ",":
            self.take()
            arguments.append(self.sequence(frozenset({","})))
        wanted = 2 if name == "C" else 1
        if self.here is None or self.here.text != ")" or len(arguments) != wanted:
            raise FormulaError(f"formula {self.text!r} has a {name}( ) without its {wanted} argument(s)")
        self.take()
        inside = [joined(with_prose(argument)) for argument in arguments]
        marks = {"sqrt": (r"\sqrt{", "}"), "floor": (r"\lfloor ", r" \rfloor"), "ceil": (r"\lceil ", r" \rceil")}
        if name == "C":
            return rf"\binom{{{inside[0]}}}{{{inside[1]}}}"
        tall = r"\frac" in inside[0] and name != "sqrt"
        left, right = marks[name]
        return rf"\left{left}{inside[0]}\right{right.strip()}" if tall else f"{left}{inside[0]}{right}"

    def scripted(self, base: Item) -> Item:
        """Primes, subscripts, powers and argument lists that follow an atom without a space."""
        kind, text = base.kind, base.text
        while (token := self.here) is not None:
            if token.text == "'" and not token.spaced:
                self.take()
                text += "'"
            elif token.text == "_" and not token.spaced:
                self.take()
                opening = self.take().text
                if opening not in "({":
                    raise FormulaError(f"formula {self.text!r} has a '_' without a subscript")
                inner = self.bracketed(opening)
                text += f"_{{{inner[2:-2].strip() if opening == '{' else inner}}}"
            elif token.text in ("^", "**"):
                self.take()
                text = f"{text}^{{{self._power()}}}"
            elif token.text in "([" and not token.spaced and token.kind == "sign":
                self.take()
                text += self.bracketed(token.text)
                kind = "atom"
            else:
                break
        return Item(kind, text, base.spaced)

    def _power(self) -> str:
        token = self.here
        if token is not None and token.text in ("+", "-", "*"):
            after = self.ahead()
            self.take()
            if after is None or after.spaced or after.kind not in ("number", "word"):
                return token.text
            return token.text + plain(self.operand())
        return bare(self.operand())
