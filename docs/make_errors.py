"""Writes ``docs/errors.md``: every error that a user can be told, read from the source.

    python docs/make_errors.py            writes the page
    python docs/make_errors.py --check    exit code 1 where the page is not what the source says

An error is where a `UserError`, or a kind of it, is made: its two texts are worked out without running anything. What
is known only when it happens stands in braces, ``{path}``; what is said only at times in brackets, ``[...]``.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE, PAGE = ROOT / "src" / "trivium", ROOT / "docs" / "errors.md"
MOST = 12  # texts that one place in the source can give; beyond that the parts that vary stand in brackets
# (first part of a module's name, what it is called on the page): the first that fits
PARTS = (
    ("recipe", "Recipe"), ("stages", "Recipe"), ("chain", "Recipe"), ("checks", "Recipe"), ("start", "Recipe"),
    ("objectives", "Recipe"), ("train.budget", "Recipe"), ("model.new", "New models"),
    ("data", "Data"), ("sources", "Data"), ("stage_data", "Data"), ("under_way", "Data"),
    ("peft.settings", "Methods in a recipe"), ("peft.kinds", "Methods in a recipe"), ("peft.checks",
    "Methods in a recipe"),
    ("peft.targets", "Methods in a recipe"), ("peft", "Adapters"), ("api_adapters", "Adapters"), ("merging",
    "Adapters"),
    ("model", "Models"), ("folder", "Models"), ("inspect", "Models"), ("files", "Files"), ("lock", "Files"),
    ("train", "Training"), ("stage", "Training"), ("evaluate", "Judging"), ("judging", "Judging"), ("ranking",
    "Judging"),
    ("api_judged", "Judging"), ("comparing", "Comparing"), ("report", "Reports"), ("cli", "Command line"), ("",
    "Python and the rest"),
)  # fmt: skip
CODES = """\
| exit code | what it means | what to do |
|---|---|---|
| 0 | done | |
| 1 | a bug of trivium: a traceback is shown | report it, with the traceback |
| 2 | the recipe, the data, a model or an adapter cannot be used; or another run is at it | mend what it names |
| 3 | the disk is full, or may not be written to | make room; run the same command again |
| 4 | what was saved is damaged, and nothing whole is there | restore it from a copy, or `--fresh` |
| 5 | a loss or gradient is not a finite number | look at the rows named; a smaller learning rate |
| 6 | the memory does not hold the smallest pass | a shorter `max_length`, an adapter, a smaller model |
| 75 | interrupted | run the same command again: it goes on where it was |
"""


@dataclass(frozen=True)
class Row:
    """One error: what it says, what to do, where it is raised."""

    code: int
    what: str
    remedy: str
    module: str
    line: int

    @property
    def part(self) -> str:
        return next(part for first, part in PARTS if self.module.startswith(first))

    @property
    def passes_on(self) -> bool:
        """Whether what it says is what another error says, put into its place."""
        return (
            "error.what}" in self.what or "error.remedy}" in self.remedy or not re.search("[a-z]{2}", _said(self.what))
        )


class Module:
    """A source file: its tree, who encloses whom, and its strings."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        self.tree = ast.parse(path.read_text(encoding="utf-8"))
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def around(self, node: ast.AST) -> Iterator[ast.AST]:
        while (found := self.parents.get(node)) is not None:
            yield found
            node = found


@cache
def modules() -> tuple[Module, ...]:
    return tuple(Module(path) for path in sorted(SOURCE.rglob("*.py")))


@cache
def kinds() -> dict[str, int]:
    """The exit code of every kind of `UserError`, by its class's name."""
    found = {"UserError": 2}
    classes = [node for module in modules() for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]
    for _ in range(3):  # kinds of kinds
        for node in classes:
            bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in found]
            if bases and node.name not in found:
                own = [
                    n.value
                    for n in node.body
                    if isinstance(n, ast.Assign) and getattr(n.targets[0], "id", "") == "exit_code"
                ]
                found[node.name] = int(ast.literal_eval(own[0])) if own else found[bases[0]]
    return found


@cache
def constants(of: Module | None = None) -> dict[str, ast.expr]:
    """What stands at the head of a module, or of any, under names in capitals."""
    return {
        target.id: node.value
        for module in ([of] if of else modules()) for node in module.tree.body if isinstance(node, ast.Assign)
        for target in node.targets if isinstance(target, ast.Name) and target.id.isupper()
    }  # fmt: skip


@cache
def functions_of(module: Module) -> dict[str, list[ast.FunctionDef]]:
    """The functions that give a text, by name."""
    found: dict[str, list[ast.FunctionDef]] = {}
    for node in ast.walk(module.tree):
        if isinstance(node, ast.FunctionDef) and node.returns and ast.unparse(node.returns) in ("str", "str | None"):
            found.setdefault(node.name, []).append(node)
    return found


def _is_nothing(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def made() -> Iterator[tuple[Module, ast.Call, int]]:
    """Every place where an error is made, and its exit code."""
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                if node.func.id in kinds():
                    yield module, node, kinds()[node.func.id]
                elif module.name.startswith(("recipe", "train.budget")) and _refuses(module, node):
                    yield module, node, 2


def _refuses(module: Module, node: ast.Call) -> bool:
    """A field or a whole of the recipe that pydantic is told to refuse: `recipe_file` makes the error of it."""
    name = getattr(node.func, "id", "")
    return name == "wrong" or (name == "ValueError" and isinstance(module.parents.get(node), ast.Raise))


def rows() -> list[Row]:
    """All errors, in the order of the page."""
    found = []
    for module, call, code in made():
        texts = [given for given in call.args if not isinstance(given, ast.Starred)]
        whats = Texts(module, call).of(texts[0]) if texts else ["{what}"]
        whats = [_at(_field(module, call), what) for what in whats]
        mend = [ast.Name("MEND")] if getattr(call.func, "id", "") in ("wrong", "ValueError") else []
        remedies = Texts(module, call).of([*texts[1:], *mend][0]) if [*texts[1:], *mend] else ["{remedy}"]
        pairs = (
            list(zip(whats, remedies, strict=True)) if len(whats) == len(remedies) else list(product(whats, remedies))
        )
        found += [Row(code, what, remedy, module.name, call.lineno) for what, remedy in pairs]
    order = list(dict.fromkeys(part for _, part in PARTS))
    return sorted(found, key=lambda row: (row.code, order.index(row.part), row.module, row.line))


def _at(field: str, what: str) -> str:
    return field.replace("{key}: ", "") + what if re.match(r"\w+: ", what) else field + what


def _field(module: Module, call: ast.Call) -> str:
    """Where in a recipe a refused value stands, which `recipe_file` puts before what is said of it."""
    if call.func.id not in ("wrong", "ValueError") or not module.name.startswith("recipe"):  # type: ignore[attr-defined]
        return ""
    around = list(module.around(call))
    owner = next((n.name for n in around if isinstance(n, ast.ClassDef)), "")
    place = [str(n.value) if isinstance(n, ast.Constant) else f"{{{_short(n)}}}" for n in call.args[2:]]
    for node in around:
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) and not place else []:
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == "field_validator":
                place = [
                    str(n.value) if n.value != "*" else "{key}" for n in decorator.args if isinstance(n, ast.Constant)
                ][:1]
    parts = {"Stage": ["stages", "{stage}"], "DataSource": ["stages", "{stage}", "data"], "JudgeSource": ["judge"]}.get(
        owner, []
    )
    if not owner and module.name == "recipe_stage":
        parts = ["stages", "{stage}", "{key}"]
    return f"{{path}}:{{line}}: {'.'.join([*parts, *place])}: "


class Texts:
    """Works out what an expression can say at a place in the source."""

    def __init__(self, module: Module, place: ast.AST, depth: int = 0) -> None:
        self.module, self.place, self.depth = module, place, depth
        self.function = next(
            (n for n in module.around(place) if isinstance(n, (ast.FunctionDef, ast.Lambda))), module.tree
        )

    def of(self, node: ast.expr) -> list[str]:
        """Every text that it can be, at most ``MOST``."""
        found = list(dict.fromkeys(self._of(node)))
        return found if len(found) <= MOST else [" / ".join(found)]

    def _of(self, node: ast.expr) -> list[str]:
        if isinstance(node, ast.Constant):
            return [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            return _joined([self._of(value) for value in node.values])
        if isinstance(node, ast.FormattedValue):
            found = self._of(node.value)
            return found if isinstance(node.value, ast.Name) else [_in_brackets(found)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _is_text(node):
            return _joined([self._of(node.left), [_in_brackets(self._of(node.right))]])
        if isinstance(node, ast.IfExp):
            return [*self._of(node.body), *self._of(node.orelse)]
        if isinstance(node, ast.BoolOp):
            return [_in_brackets([text for value in node.values for text in self._of(value)])]
        if isinstance(node, ast.Name):
            return self._named(node.id)
        if isinstance(node, ast.Call):
            return self._called(node)
        return [f"{{{_short(node)}}}"]

    def _called(self, node: ast.Call) -> list[str]:
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name == "nearest":
            return ["[; did you mean '{name}'?]"]
        if name == "beside":
            return ["[; in {folder} there is: {names}]"]
        if (
            name == "join"
            and node.args
            and isinstance(node.args[0], ast.Call)
            and getattr(node.args[0].func, "attr", "") == "split"
        ):
            return self._of(node.args[0].func.value)  # type: ignore[attr-defined]
        if name == "format" or (name in ("strip", "removesuffix") and isinstance(node.func, ast.Attribute)):
            return self._of(node.func.value)  # type: ignore[union-attr]
        functions = [(self.module, n) for n in functions_of(self.module).get(name, [])]
        functions = functions or [(m, n) for m in modules() for n in functions_of(m).get(name, [])]
        if (
            len(functions) == 1
            and self.depth < 3
            and (given := [n.value for n in ast.walk(functions[0][1]) if isinstance(n, ast.Return) and n.value])
        ):
            inside = [
                Texts(functions[0][0], value, self.depth + 1)._of(value) for value in given if not _is_nothing(value)
            ]
            found = [text for texts in inside for text in texts]
            if not all(re.fullmatch(r"\{.*\}", text) for text in found):
                return found
        return [f"{{{_short(node)}}}"]

    def _named(self, name: str) -> list[str]:
        """What a variable holds here: assigned before in this function, or at the head of a module."""
        if (value := self._constant(name)) is not None:
            return Texts(self.module, self.module.tree)._of(value)
        found = [text for value in self._assigned(name) for text in self._of(value)]
        found = found or [text for value in self._parted(name) for text in self._of(value)]
        known = found and all(re.search(r"[a-z]", _said(text)) or not text for text in found) and "None" not in found
        return found if known else [f"{{{name}}}"]

    def _constant(self, name: str) -> ast.expr | None:
        """What a name in capitals stands for, in this module or else in any."""
        return constants(self.module).get(name, constants().get(name))

    def _assigned(self, name: str) -> Iterator[ast.expr]:
        line = getattr(self.place, "lineno", 0)
        values: list[tuple[int, ast.expr]] = []
        for node in ast.walk(self.function):
            if isinstance(node, ast.Assign) and node.lineno < line:
                values += [(node.lineno, value) for value in _to(node.targets[0], node.value, name)]
            elif isinstance(node, ast.NamedExpr) and node.lineno <= line and node.target.id == name:
                values.append((node.lineno, node.value))
            elif isinstance(node, ast.For) and node.lineno < line and isinstance(node.iter, ast.Name):
                table = self._constant(node.iter.id)
                entries = table.elts if isinstance(table, (ast.Tuple, ast.List)) else []
                values += [(node.lineno, value) for entry in entries for value in _to(node.target, entry, name)]
        values = [(at, value) for at, value in values if not self._ended(value)]
        own = [
            (at, value)
            for at, value in values
            if name not in {n.id for n in ast.walk(value) if isinstance(n, ast.Name)}
        ]
        if own and not self._in_branches(own):
            own = own[-1:] if len({at for at, _ in own}) > 1 else own
        yield from (value for _, value in own)

    def _parted(self, name: str) -> Iterator[ast.expr]:
        """The text of which a variable is what follows a sign: ``key, _, what = found.partition(": ")``."""
        for node in ast.walk(self.function):
            if (
                isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Tuple)
                and isinstance(node.value, ast.Call)
            ):
                last = node.targets[0].elts[-1]
                if getattr(node.value.func, "attr", "") == "partition" and getattr(last, "id", "") == name:
                    yield node.value.func.value  # type: ignore[attr-defined]

    def _ended(self, value: ast.expr) -> bool:
        """Whether the branch in which the value is assigned does not come to this place."""
        shared, node = set(self.module.around(self.place)), value
        for around in self.module.around(value):
            if isinstance(around, ast.If) and around not in shared:
                body = around.orelse if any(n is node or node in ast.walk(n) for n in around.orelse) else around.body
                if isinstance(body[-1], (ast.Raise, ast.Return, ast.Continue)):
                    return True
        return False

    def _in_branches(self, values: list[tuple[int, ast.expr]]) -> bool:
        """Whether what is assigned last need not be what holds: it stands in a branch of its own."""
        last = values[-1][1]
        shared = set(self.module.around(self.place))
        return any(isinstance(n, (ast.If, ast.ExceptHandler)) and n not in shared for n in self.module.around(last))


def _to(target: ast.expr, value: ast.expr, name: str) -> list[ast.expr]:
    """What an assignment gives the variable."""
    if isinstance(target, ast.Name):
        return [value] if target.id == name else []
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        return [v for t, v in zip(target.elts, value.elts, strict=True) if isinstance(t, ast.Name) and t.id == name]
    return []


def _is_text(node: ast.expr) -> bool:
    """Whether a sum is one of texts."""
    if isinstance(node, ast.BinOp):
        return _is_text(node.left) or _is_text(node.right)
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _said(text: str) -> str:
    """What is left of a text without what is known only when it happens."""
    return re.sub(r"\{.*?\}", "", text)


def _joined(parts: list[list[str]]) -> list[str]:
    if len(list(product(*parts))) > MOST:
        parts = [[_in_brackets(texts)] for texts in parts]
    return ["".join(texts) for texts in product(*parts)]


def _in_brackets(texts: list[str]) -> str:
    """Several texts as one: ``[a]`` where it may be left out, ``[a | b]`` where it is one or the other."""
    texts = list(dict.fromkeys(texts))
    said = [text for text in texts if text]
    if len(texts) == 1:
        return texts[0]
    return f"[{' / '.join(said)}]" if said else ""


def _short(node: ast.expr) -> str:
    """A name for a value that is known only when it happens."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return _short(node.value) + f".{node.attr}" if not _is_self(node.value) else node.attr
    if isinstance(node, ast.Subscript):
        return _short(node.value)
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if node.args and name not in ("join", "get", "sum"):
            return _short(node.args[-1 if name == "map" else 0])
        if name == "join" and node.args:
            return _short(node.args[0])
        return _short(node.func.value) if isinstance(node.func, ast.Attribute) else name
    if isinstance(node, (ast.GeneratorExp, ast.ListComp, ast.SetComp)):
        return _short(node.generators[0].iter)
    if isinstance(node, ast.BinOp):
        return "path" if isinstance(node.op, ast.Div) else "line" if "line" in ast.unparse(node) else "number"
    if isinstance(node, ast.Starred):
        return _short(node.value)
    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
    return names[0] if names else "value"


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


# --- the page


def page() -> str:
    """``docs/errors.md`` as the source has it."""
    found = rows()
    codes = {row.code for row in found} | {0, 1}
    table = "\n".join(line for line in CODES.splitlines() if not line[2].isdigit() or int(line[2:4]) in codes)
    told = [row for row in found if not row.passes_on]
    out = [HEAD.format(codes=table.strip(), count=len(told))]
    for code in sorted({row.code for row in told}):
        out.append(f"\n## Exit code {code}: {TITLES[code]}\n")
        for part in dict.fromkeys(row.part for row in told if row.code == code):
            some = [row for row in told if (row.code, row.part) == (code, part)]
            out += [f"\n### {part}\n", "| it says | what to do | raised in |", "|---|---|---|"]
            out += [f"| {_cell(row.what)} | {_cell(row.remedy)} | `{row.module}` |" for row in some]
    out += [PASSED, "| it says | what to do | raised in |", "|---|---|---|"]
    out += [f"| {_cell(row.what)} | {_cell(row.remedy)} | `{row.module}` |" for row in found if row.passes_on]
    return "\n".join(out) + "\n"


TITLES = {2: "recipe, data, models", 3: "the disk", 4: "checkpoints", 5: "not finite", 6: "memory", 75: "interrupted"}
PASSED = """\

## Passed on

These put a place before what one of the errors above says, or hand it on as it is.
"""
HEAD = """\
# Every error that trivium can tell you

<!-- written by docs/make_errors.py from the source: change the source, then run it -->

A mistake in a recipe, in data or in a folder is told in two lines: what was found and where, and what to do about it.
No traceback is shown, nothing is left half written, and what was finished is kept. The exit code tells the kind:

{codes}

**How to read this page.** The {count} messages are read from the source, in the order of the exit codes and of the
parts of the program; the last column is the module that raises them. What is known only when it happens stands in
braces, `{{path}}`; what is said only at times in brackets, `[; did you mean '...'?]`, with a stroke between
alternatives. To find the one you got, search for words of it that are no name of yours. A value of the wrong type or
out of range is told in the words of pydantic, such as
`recipe.yaml:7: stages.chat.beta: Input should be greater than 0 (got -1)`.

Rows that cannot be used are no errors by themselves: each is set aside, counted, and told with its file and line;
`trivium data check` shows them. They stop a run where there are more than `bad_rows` allows.
"""


def _cell(text: str) -> str:
    """A text in a cell of a table: nothing in it is Markdown or HTML."""
    text = " ".join(text.split())
    return re.sub(r"([|\\`*_<>\[\]~#$])", r"\\\1", text)


def main(arguments: list[str]) -> int:
    if "--check" in arguments:
        there = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
        if there != page():
            print("docs/errors.md is not what the source says: run python docs/make_errors.py")
            return 1
        return 0
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
