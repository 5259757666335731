"""The texts that the package's Python shows on the page, as templates: "{pictures} cannot be used".

An expression is worked out as far as its text is known where it stands: both branches of a condition, what a variable of the
function was set to, an error as the one sentence of its parts. What is not known is a field, named after its expression.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

ERRORS = re.compile(r"(Error|Interrupted|ProcessLost|ProcessesDiffer)$")
"""Classes of errors.py and their subclasses: what, why=, remedy= make one sentence."""
FOREIGN = re.compile(r"^(Value|Type|Key|OS|Runtime|Assertion|Memory|Permission|Unicode\w*)Error$")
COUNTING = ("counted", "_count")
"""Functions that put a number before a noun: (number, one, many)."""
WORDS = {"setting": (1, 2), "Button": (0,), "Tab": (0,), "Accordion": (0,), "PlainSource": (1,), "stage": (0,), "Stage": (0,),
         "begin": (0,)}
"""Calls whose text may be a single word -> which of their arguments."""
SILENT = ("debug", "info", "warning", "error", "exception", "compile", "add_text", "getLogger", "encode", "startswith",
          "endswith", "partition", "split", "Response", "add_upload", "post", "get", "HTML", "match", "sub")
"""Calls whose strings nobody reads on the page."""
WORD_TABLES = ("FOLDS",)
"""Tables of the page whose values may be single words."""
REASONS = ("text_files.py", "caption_files.py", "buckets.py", "field.py", "arguments.py", "network_checks.py", "__init__.py")
"""Files of `dataset` and `settings` whose errors are said in the sentences of others, without what they are about."""
MOST = 12
"""Alternatives of one sentence; beyond, what varies most is a field."""
_FIELD = re.compile("\ue000(.*?)\ue001(.*?)\ue002", re.DOTALL)
_TWO_WORDS = re.compile(r"[A-Za-z]{2,}[^\w\s]* +[^\w\s]*[A-Za-z]")
_WORD_BESIDE_FIELD = re.compile(r"(^|[\ue002 ])[a-z]{2,}[^\w\s]* \ue000|\ue002[^\w\s]* +[a-z]{2,}([ ,.:;]|$)")
_NAME = re.compile(r"[\w.]*[._][\w.]*|[^A-Za-z]*")
"""A file's, a key's, a setting's; or nothing but fields."""
_CODE = re.compile(r"</|^<(?!lora)|://|^--?[a-z]|^[\w./-]+$|=\{?$|\w\(\)|; charset|^'|\\[wds]|^\s*$|max-age|default-src")


def texts_of(path: Path, constants: dict[str, list[ast.expr]]) -> dict[str, int]:
    """template -> line of the first place, of one file. `constants` are the package's, by name."""
    # An address of the API is added with a line for its documentation.
    reader = _Reader(constants, {*SILENT, *(["add"] if path.parent.name == "api" else [])},
                     reasons=path.parent.name in ("dataset", "settings") and path.name in REASONS)
    reader.module(ast.parse(path.read_text("utf-8")))
    return reader.found


def constants_of(paths: Iterable[Path]) -> dict[str, list[ast.expr]]:
    """The texts in capitals at the top of files, which other files import."""
    found: dict[str, list[ast.expr]] = {}
    for path in paths:
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id.isupper():
                found.setdefault(node.targets[0].id, []).append(node.value)
    return found


def _field(node: ast.expr) -> str:
    return f"\ue000{_name(node)}\ue001{ast.unparse(node)}\ue002"


def _name(node: ast.expr) -> str:
    """What a field is called: the last name that its expression is about."""
    if isinstance(node, ast.Name):
        return node.id.strip("_")
    if isinstance(node, ast.Attribute):
        return node.attr.strip("_")
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
        return node.value
    if isinstance(node, ast.Call):
        for inner in node.args:
            if (name := _name(inner)) != "value":
                return name
        return _name(node.func.value) if isinstance(node.func, ast.Attribute) else _name(node.func)
    for inner in ast.iter_child_nodes(node):
        if isinstance(inner, ast.expr) and (name := _name(inner)) != "value":
            return name
    return "value"


def finished(template: str) -> str:
    """The template with fields of different names: "{width}×{height}", "{name} and {name2}"."""
    names: dict[str, str] = {}

    def named(found: re.Match[str]) -> str:
        name, expression = found.groups()
        if expression not in names:
            taken = set(names.values())
            names[expression] = next(n for n in itertools.chain([name], (f"{name}{k}" for k in itertools.count(2)))
                                     if n not in taken)
        return "{" + names[expression] + "}"

    return _FIELD.sub(named, template.replace("{}", "\ue000value\ue001{}\ue002"))


def is_text(template: str) -> bool:
    """Whether somebody may read it, and not only a program."""
    plain = _FIELD.sub("", template)
    return not _CODE.search(plain) and bool(_TWO_WORDS.search(plain) or (
        "\ue000" in template and _WORD_BESIDE_FIELD.search(template)))


class _Scope:
    """What the names of a function, or of a file, were set to; None where that is not known."""

    def __init__(self, outer: _Scope | None = None) -> None:
        self.outer = outer
        self.set: dict[str, list[ast.expr | None]] = {}
        self.added: dict[str, list[ast.expr]] = {}

    def read(self, body: Iterable[ast.AST]) -> None:
        for node in body:
            self._statement(node)
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
                self.read(ast.iter_child_nodes(node))

    def _statement(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self.bind(target, node.value)
        elif isinstance(node, (ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
            self.bind(node.target, node.value)
        elif isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) and isinstance(node.op, ast.Add):
            self.added.setdefault(node.target.id, []).append(node.value)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)):
            listed = node.iter.elts if isinstance(node.iter, (ast.Tuple, ast.List)) else [None]
            for value in listed:
                self.bind(node.target, value)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self.bind(node.optional_vars, None)

    def bind(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Name):
            self.set.setdefault(target.id, []).append(value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            apart = isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts)
            for number, inner in enumerate(target.elts):
                self.bind(inner, value.elts[number] if apart else None)  # type: ignore[union-attr]

    def find(self, name: str) -> _Scope | None:
        if name in self.set:
            return self
        return self.outer.find(name) if self.outer else None


class _Reader:
    """Reads one file; `found` is template -> line."""

    def __init__(self, constants: dict[str, list[ast.expr]], silent: set[str], *, reasons: bool) -> None:
        self.found: dict[str, int] = {}
        self._silent, self._reasons = silent, reasons
        self._constants = constants
        self._scope = _Scope()
        self._used: set[ast.expr] = set()  # values that stand in the sentence of another expression
        self._later: list[tuple[ast.expr, _Scope]] = []
        self._busy: set[str] = set()

    # ---- statements ----

    def module(self, tree: ast.Module) -> None:
        self._constant = {node.name: said for node in tree.body if isinstance(node, ast.FunctionDef)
                          if (said := _always(node))}
        self._scope.read(tree.body)
        self._body(tree.body)
        for value, scope in self._later:
            if value not in self._used:
                self._scope = scope
                self._expression(value)

    def _body(self, body: list[ast.stmt]) -> None:
        for node in body:
            if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):  # a docstring
                self._statement(node)

    def _statement(self, node: ast.AST) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            outer, self._scope = self._scope, _Scope(self._scope)
            for argument in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs):
                self._scope.bind(ast.Name(argument.arg), None)
            self._scope.read(node.body)
            for default in (*node.args.defaults, *node.args.kw_defaults):
                if default is not None:
                    self._expression(default)
            self._body(node.body)
            self._scope = outer
        elif isinstance(node, ast.ClassDef):
            self._body(node.body)
        elif isinstance(node, ast.Assert):
            pass
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
            self._assigned(node)
        else:
            for inner in ast.iter_child_nodes(node):
                if isinstance(inner, ast.expr):
                    self._expression(inner)
                else:
                    self._statement(inner)

    def _assigned(self, node: ast.Assign | ast.AnnAssign | ast.AugAssign) -> None:
        """Names wait until it is clear whether another sentence has them in it."""
        if node.value is None:
            return
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if isinstance(targets[0], ast.Name) and targets[0].id in WORD_TABLES and isinstance(node.value, ast.Dict):
            for value in node.value.values:
                self._expression(value, word=True)
            return
        named = all(isinstance(inner, (ast.Name, ast.Tuple, ast.List)) for inner in targets)
        if not named:
            self._expression(node.value)
        elif isinstance(node.value, ast.Tuple) and isinstance(targets[0], ast.Tuple):
            self._later.extend((inner, self._scope) for inner in node.value.elts)
        else:
            self._later.append((node.value, self._scope))

    # ---- expressions ----

    def _expression(self, node: ast.expr, *, word: bool = False) -> None:
        known = self._texts(node)
        if known is not None:
            self._emit(known, node, word=word)
            for inner in ast.walk(node):
                if isinstance(inner, ast.Call) and inner is not node and self._texts(inner) is None:
                    self._call(inner)
        elif isinstance(node, ast.Call):
            self._call(node)
        elif isinstance(node, ast.Compare):
            pass
        elif isinstance(node, ast.Subscript):
            self._expression(node.value)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self._expression(child, word=word and isinstance(node, (ast.Tuple, ast.List)))
                elif isinstance(child, ast.comprehension):
                    self._expression(child.iter)

    def _call(self, node: ast.Call) -> None:
        called = _called(node)
        if called in self._silent:
            return
        if isinstance(node.func, ast.Attribute):
            self._expression(node.func.value)
        for number, argument in enumerate(node.args):
            self._expression(argument, word=number in WORDS.get(called, ()))
        for keyword in node.keywords:
            self._expression(keyword.value, word=called in WORDS and keyword.arg in ("zero", "label", "name"))

    def _emit(self, templates: Iterable[str], node: ast.expr, *, word: bool = False) -> None:
        for template in templates:
            shown = template.strip()
            if is_text(shown) or word and re.search("[A-Za-z]{2}", shown):
                self.found.setdefault(finished(shown), node.lineno)

    # ---- what an expression says ----

    def _texts(self, node: ast.expr) -> list[str] | None:
        """Every text the expression may be, None where it is none that is known."""
        if isinstance(node, ast.Constant):
            return [node.value] if isinstance(node.value, str) else None
        if isinstance(node, ast.JoinedStr):
            return self._combined([self._part(part) for part in node.values])
        if isinstance(node, ast.IfExp):
            return self._either(node.body, node.orelse)
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or):
            return self._either(*node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            sides = [self._texts(node.left), self._texts(node.right)]
            if all(side is None for side in sides):
                return None
            return self._combined([side if side is not None else [_field(part)]
                                 for side, part in zip(sides, (node.left, node.right), strict=True)])
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            said = self._texts(node.left)
            return None if said is None else ["", *said]
        if isinstance(node, ast.Name):
            return self._variable(node)
        return self._called_text(node) if isinstance(node, ast.Call) else None

    def _part(self, part: ast.expr) -> list[str]:
        if isinstance(part, ast.Constant):
            return [str(part.value)]
        assert isinstance(part, ast.FormattedValue)
        said = self._texts(part.value) if part.conversion == -1 and part.format_spec is None else None
        return [_field(part.value)] if said is None else said

    def _either(self, *branches: ast.expr) -> list[str] | None:
        said = [self._texts(branch) for branch in branches]
        if all(one is None for one in said):
            return None
        return list(dict.fromkeys(text for one, branch in zip(said, branches, strict=True)
                                  for text in (one if one is not None else [_field(branch)])))

    def _combined(self, parts: list[list[str]]) -> list[str]:
        parts = [list(part) for part in parts]
        while (total := _product(len(part) for part in parts)) > MOST:
            widest = max(parts, key=len)
            for text in widest:
                if is_text(text.strip()):
                    self.found.setdefault(finished(text.strip()), 0)
            name = next((m[1] for t in widest if (m := _FIELD.search(t))), "part")
            widest[:] = [f"\ue000{name}\ue001{id(widest)}\ue002"]
            assert total
        return ["".join(chosen) for chosen in itertools.product(*parts)]

    def _variable(self, node: ast.Name) -> list[str] | None:
        scope = self._scope.find(node.id)
        values = scope.set[node.id] if scope else self._constants.get(node.id)
        key = f"{id(scope)} {node.id}"
        if not values or key in self._busy:
            return None
        here, self._scope = self._scope, scope or self._scope
        self._busy.add(key)
        said = [None if value is None else self._texts(value) for value in values]
        shown = [text for one in said if one is not None for text in one]
        if shown and not all(_NAME.fullmatch(_FIELD.sub("", text)) for text in shown):
            self._used.update(value for value in values if value is not None)
            found = list(dict.fromkeys(text for one in said for text in (one if one is not None else [_field(node)])))
            for added in scope.added.get(node.id, []) if scope else []:
                more = self._texts(added)
                self._used.add(added)
                found = self._combined([found, ["", *(more if more is not None else [_field(added)])]])
        else:
            found = None
        self._busy.discard(key)
        self._scope = here
        return found

    def _called_text(self, node: ast.Call) -> list[str] | None:
        called = _called(node)
        if called in COUNTING and len(node.args) > 1:
            return self._counted(node)
        if called in ("printable", "str") and len(node.args) == 1:
            return self._texts(node.args[0])
        if called in self._constant and isinstance(node.func, ast.Name):
            return self._constant[called]
        if not node.args or isinstance(node.args[0], ast.Starred) or FOREIGN.match(called):
            return None
        # A class that was given has no name, but the parts of an error.
        given = isinstance(node.args[0], ast.JoinedStr) and any(keyword.arg in ("why", "remedy") for keyword in node.keywords)
        return self._sentence(node) if given or ERRORS.search(called) else None

    def _counted(self, node: ast.Call) -> list[str] | None:
        nouns = [self._texts(argument) for argument in node.args[1:]]
        if not nouns[0] or len(nouns[0]) > 1 or "\ue000" in nouns[0][0]:
            return None
        one = nouns[0][0]
        if not re.fullmatch(r"[\w' -]+", one):
            return None
        many = nouns[1][0] if len(nouns) > 1 and nouns[1] else one + "s"
        number = f"\ue000number\ue001{ast.unparse(node.args[0])}\ue002"
        both = [f"1 {one}", f"{number} {many}"]
        if len(nouns) > 1 and " " in many:
            return both  # "1 picture is", which has no meaning of its own
        for text in both:
            self.found.setdefault(finished(text), node.lineno)
        return [f"\ue000counted_{many.replace(' ', '_').replace('-', '_')}\ue001{ast.unparse(node)}\ue002"]

    def _sentence(self, node: ast.Call) -> list[str]:
        """An error as `str` gives it: "what: why; remedy.". Where why is not known here, what is to be done may stand in
        another sentence too."""
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        parts = [self._known(node.args[0], "{}"), *(
            self._known(given[name], around) for name, around in (("why", ": {}"), ("remedy", "; {}")) if name in given)]
        if parts[0] == [""]:  # what it is about is said by who catches it
            self._emit((text[2:] for text in itertools.chain(*parts[1:])), node)
            return []
        if self._reasons or "remedy" in given and "why" in given and self._texts(given["why"]) is None:
            self._emit((text[2:] for text in itertools.chain(*parts[1:])), node)
        return [text if text.endswith("?") else text + "." for text in self._combined(parts)]

    def _known(self, node: ast.expr, around: str) -> list[str]:
        said = self._texts(node)
        return [around.format(text.rstrip(".")) if text else "" for text in (said if said is not None else [_field(node)])]


def _always(function: ast.FunctionDef) -> list[str]:
    """What a function returns that only chooses between words: "is" or "are"; [] for any other."""
    body = function.body[0] if len(function.body) == 1 else None
    chosen = body.value if isinstance(body, ast.Return) else None
    branches = [chosen.body, chosen.orelse] if isinstance(chosen, ast.IfExp) else []
    return [branch.value for branch in branches if isinstance(branch, ast.Constant) and isinstance(branch.value, str)]


def _called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""


def _product(counts: Iterator[int] | Iterable[int]) -> int:
    total = 1
    for count in counts:
        total *= count
    return total
