"""Formulas as docstrings write them, in plain text -> LaTeX.

    A = (r - mean_group) / (std_group + eps)

reads well in a terminal and becomes a fraction on a page. The rules: a slash between spaces is a fraction and a tight
one stays a slash; `_` and `^` are scripts; `|x|` is an absolute value, `p || q` a divergence's bar; `C(n, k)` is a
binomial; words are upright; names that the caller knows to be code are set in a typewriter face.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Literal, NamedTuple

GREEK = {
    name: rf"\{name}"
    for name in (
        *("alpha", "beta", "gamma", "delta", "eta", "lambda", "mu", "nu", "phi", "pi", "psi", "rho", "sigma", "tau"),
        *("omega", "theta", "Omega", "Delta", "Phi"),
    )
} | {"eps": r"\varepsilon", "epsilon": r"\varepsilon", "lam": r"\lambda"}
# Functions that LaTeX knows, and others that are set upright. Without parentheses they apply to what follows.
FUNCTIONS = {name: rf"\{name}" for name in ("log", "exp", "max", "min", "tanh", "cos", "sin")} | {
    "sum": r"\sum",
    "log2": r"\log_2",
    "grad": r"\nabla",
}
UPRIGHT = frozenset({"mean", "std", "median", "KL"})
SCRIPTED = frozenset({*GREEK, *FUNCTIONS, *UPRIGHT})
JOINING = frozenset(
    {
        *("a", "and", "as", "at", "by", "each", "else", "elsewhere", "for", "from", "if", "in", "is", "its", "not"),
        *("of", "on", "or", "over", "right", "so", "than", "that", "the", "to", "under", "where", "which", "with"),
        *("without", "wrong"),
    }
)
LOGICAL = frozenset({"where", "if", "else", "and", "or"})
OPERATORS = {
    "<-": r"\leftarrow",
    "->": r"\to",
    ">=": r"\ge",
    "<=": r"\le",
    "!=": r"\ne",
    "==": "=",
    "||": r"\,\Vert\,",
    "+-": r"\pm",
    "*": r"\cdot",
    "<": r"\lt",
    ">": r"\gt",
    "~": r"\sim",
} | {sign: sign for sign in "+-=:"}
BRACKETS = {"(": ("(", ")"), "[": ("[", "]"), "{": (r"\{", r"\}"), "|": (r"\lvert", r"\rvert")}
CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}

_TOKEN = re.compile(
    r"""(?P<space>\s*)(?:
      (?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d+)?%?)
    | (?P<word></?[a-z]+>|[A-Za-z]+@\w+|[A-Za-z]+(?:-[A-Za-z]{2,})+(?![A-Za-z])|[A-Za-z]{2,}'s\b
        |[A-Za-z][A-Za-z0-9]*(?:_[A-Za-z0-9]+)*)
    | (?P<sign><-|->|>=|<=|!=|==|\|\||\+-|\*\*|[-+*/=<>~^_'(){}\[\]|,;:.!?\#`])
    | (?P<other>\S)
    )""",
    re.X,
)


class FormulaError(ValueError):
    """A formula that cannot be translated; the message shows it."""


class Token(NamedTuple):
    """A piece of plain text, and whether a space stands before it."""

    text: str
    kind: str
    spaced: bool


class Item(NamedTuple):
    """A translated piece: an atom (anything that an operator applies to), an operator, prose or punctuation."""

    kind: Literal["atom", "prefix", "operator", "prose", "punctuation"]
    text: str
    spaced: bool


def tokens(text: str) -> list[Token]:
    """The pieces of a formula.

    >>> [token.text for token in tokens("A_i <- 2 r_i")]
    ['A_i', '<-', '2', 'r_i']
    """
    found = []
    for match in _TOKEN.finditer(text.strip()):
        kind = next(name for name in ("number", "word", "sign", "other") if match[name] is not None)
        found.append(Token(match[kind], kind, bool(match["space"]) or not found))
    return found


def latex(text: str, code: Collection[str] = ()) -> str:
    r"""One formula as LaTeX; `code` are names to be set in a typewriter face, such as hyper-parameters.

    >>> latex("A = (r - mean_group) / (std_group + eps)")
    'A = \\frac{r - \\mathrm{mean}_{\\text{group}}}{\\mathrm{std}_{\\text{group}} + \\varepsilon}'

    Raises:
      FormulaError: where a bracket has no partner or an operator no operand.
    """
    return joined(items(text, code))


def items(text: str, code: Collection[str] = ()) -> list[Item]:
    """The translated pieces of a formula, in order; see `latex`."""
    reader = _Reader(text, frozenset(code))
    found = reader.sequence(frozenset())
    if reader.here is not None:
        raise FormulaError(f"formula {text!r} has a {reader.here.text!r} without a partner")
    return _with_prose(found)


def joined(pieces: list[Item]) -> str:
    """LaTeX of translated pieces, with the spaces that LaTeX would not put there by itself."""
    text, before = "", None
    for number, item in enumerate(pieces):
        after = pieces[number + 1] if number + 1 < len(pieces) else None
        if item.kind == "prose":
            left = " " if before is not None and before.kind in ("atom", "prefix") else ""
            # A sign that follows a word such as "if" belongs to what comes after it.
            joining = after is not None and after.kind == "operator" and item.text.split()[-1] in JOINING
            right = " " if joining or (after is not None and after.kind in ("atom", "prefix")) else ""
            text += rf"\text{{{left}{_escaped(item.text)}{right}}}"
        elif item.kind == "operator":
            text += f" {item.text} "
        elif item.kind == "punctuation":
            text += item.text + (r"\ " if after is not None and item.text in ",;" else " ")
        else:
            apart = before is not None and before.kind == "atom" and item.spaced
            # LaTeX puts a space behind \log by itself, behind an upright word it does not.
            upright = before is not None and before.kind == "prefix" and before.text.startswith(r"\mathrm")
            bracket = item.text.startswith(("(", "[", r"\left"))
            text += r"\," if apart or (upright and not bracket) else " "
            text += item.text
        before = item
    return re.sub(r" {2,}", " ", text).strip()


def _escaped(words: str) -> str:
    return re.sub(r"([#%&$_{}])", r"\\\1", words)


def _typewriter(name: str) -> str:
    return rf"\mathtt{{{_escaped(name)}}}"


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
            raise FormulaError(f"formula {self.text!r} ends where something should follow")
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
        # A bar closes only after an operand; before one it opens an absolute value within.
        return token.text in until and (token.text != "|" or (bool(found) and found[-1].kind != "operator"))

    def _is_sign(self, found: list[Item]) -> bool:
        """Whether + or - stands before its only operand, as in `has -1`."""
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
            raise FormulaError(f"formula {self.text!r} divides nothing")
        over = found.pop()
        while over.kind == "prose" and found and found[-1].kind == "prose":
            above = found.pop()
            over = Item("prose", f"{above.text} {over.text}", above.spaced)
        if not slash.spaced:
            under = self.operand()
            found.append(Item("atom", f"{_plain(over)} / {_plain(under)}", over.spaced))
            return
        under = self.operand()
        while under.kind == "prose" and self.here is not None and self.here.kind == "word":
            token = self.take()
            under = Item("prose", f"{under.text} {token.text}", under.spaced)
        found.append(Item("atom", rf"\frac{{{_bare(over)}}}{{{_bare(under)}}}", over.spaced))

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
            base = Item("atom", _number(token.text), token.spaced)
        elif token.kind == "word":
            base = self.word(token)
        elif token.text in BRACKETS:
            base = Item("atom", self.bracketed(token.text), token.spaced)
        elif token.text == "#":
            counted = self.bracketed(self.take().text) if self._opens() else _plain(self.atom())
            base = Item("atom", rf"\#{counted}", token.spaced)
        elif token.text == ".":
            base = Item("atom", r"\cdot", token.spaced)
        elif token.text == "`":
            words = []
            while (inner := self.take()).text != "`":
                words.append(inner.text)
            base = Item("atom", _typewriter("".join(words)), token.spaced)
        else:
            raise FormulaError(f"formula {self.text!r} has {token.text!r} where something else should stand")
        return self.scripted(base)

    def bracketed(self, opening: str) -> str:
        inside = _with_prose(self.sequence(frozenset({CLOSING[opening]})))
        if self.here is None or self.here.text != CLOSING[opening]:
            raise FormulaError(f"formula {self.text!r} has a {opening!r} without a partner")
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
                return Item("atom", _typewriter(text), spaced)
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
            script = ",".join(_script(part) for part in scripts)
            operator = head in FUNCTIONS or head in UPRIGHT
            return Item("prefix" if operator and not called else "atom", f"{base}_{{{script}}}", spaced)
        if scripts and not called:
            return Item("atom", _typewriter(text), spaced)
        if text in GREEK or (len(text) == 1 and not self._article()):
            return Item("atom", GREEK.get(text, text), spaced)
        if re.fullmatch(r"[A-Za-z]\d+", text):
            return Item("atom", f"{text[0]}_{{{text[1:]}}}", spaced)
        scripted = after is not None and not after.spaced and after.text == "_"
        if called or (scripted and text in UPRIGHT):
            return Item("prefix" if scripted else "atom", rf"\mathrm{{{_escaped(text)}}}", spaced)
        return Item("atom", rf"\text{{{text}}}", spaced) if scripted else Item("prose", text, spaced)

    def _symbol(self, name: str) -> str:
        if name in self.code or "_" in name:
            return _typewriter(name)
        if name in UPRIGHT:
            return rf"\mathrm{{{name}}}"
        return GREEK.get(name) or (name if len(name) == 1 else rf"\text{{{name}}}")

    def _operand(self) -> bool:
        """Whether the word just taken stands between operators, brackets and commas: it is a variable then."""
        before, after = self.ahead(-2), self.here
        applied = before is not None and (before.text in FUNCTIONS or before.text.split("_")[0] in SCRIPTED)
        opened = before is None or (before.kind == "sign" and before.text not in ".:;)]}'`") or applied
        closed = after is None or (after.kind == "sign" and after.text not in ".:'`({[")
        return (opened and closed) or self._compared()

    def _compared(self) -> bool:
        """Whether the word just taken stands between `where`, `and` or the like and an operator, on either side."""
        before, after = self.ahead(-2), self.here
        if before is None or after is None:
            return False
        signs = OPERATORS.keys() - {":", "||"} | {"/"}
        return (before.text in LOGICAL and after.text in signs) or (before.text in signs and after.text in LOGICAL)

    def _ends_prose(self) -> bool:
        """Whether the name of a function just taken is a word of a sentence, as in `max of` and `where the sum is`."""
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
        """The functions that are not written as a name before parentheses."""
        self.take()
        arguments = [self.sequence(frozenset({","}))]
        while self.here is not None and self.here.text == ",":
            self.take()
            arguments.append(self.sequence(frozenset({","})))
        wanted = 2 if name == "C" else 1
        if self.here is None or self.here.text != ")" or len(arguments) != wanted:
            raise FormulaError(f"formula {self.text!r} has a {name}( ) without its {wanted} argument(s)")
        self.take()
        inside = [joined(_with_prose(argument)) for argument in arguments]
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
            return token.text + _plain(self.operand())
        return _bare(self.operand())


def _plain(item: Item) -> str:
    return rf"\text{{{_escaped(item.text)}}}" if item.kind == "prose" else item.text


def _bare(item: Item) -> str:
    """An operand without the parentheses that a fraction bar or a raised position makes needless."""
    text = _plain(item)
    for left, right in ((r"\left(", r"\right)"), ("(", ")")):
        if text.startswith(left) and text.endswith(right):
            inside = text[len(left) : -len(right)]
            if _balanced(inside):
                return inside.strip()
    return text


def _balanced(text: str) -> bool:
    depth = 0
    for sign in re.findall(r"[()]", text):
        depth += 1 if sign == "(" else -1
        if depth < 0:
            return False
    return depth == 0


def _number(text: str) -> str:
    percent = r"\%" if text.endswith("%") else ""
    mantissa, _, exponent = text.rstrip("%").lower().partition("e")
    if not exponent:
        return mantissa + percent
    factor = "" if mantissa in ("1", "1.0") else rf"{mantissa} \times "
    return f"{factor}10^{{{int(exponent)}}}{percent}"


def _script(text: str) -> str:
    if text in GREEK:
        return GREEK[text]
    return text if len(text) <= 2 or text.isdigit() else rf"\text{{{text}}}"


def _with_prose(pieces: list[Item]) -> list[Item]:
    """Neighbouring words as one piece of prose."""
    merged: list[Item] = []
    for item in pieces:
        if item.kind == "prose" and merged and merged[-1].kind == "prose":
            last = merged.pop()
            item = Item("prose", f"{last.text} {item.text}", last.spaced)
        merged.append(item)
    return merged
