"""The blocks that stand in more than one script: which they are, and a copier for them.

  python3 -m tests.shared            say what is wrong; exit code 1 when something is
  python3 -m tests.shared --write    copy each block from the script it belongs to to the others

A block is marked, in every file that has it, by two lines at the left margin:

    # --- shared: NAME -- the same text in A.py and B.py --
    # --- end shared: NAME --

The first file of a registry entry has the original; the marker names all of them.
"""

import ast
import builtins
import os
import re
import symtable
import sys
from typing import Any, Dict, FrozenSet, List, NamedTuple, Optional, Sequence, Set, Tuple

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Block(NamedTuple):
    """A shared block: the scripts that have it, and what it may use of them."""

    files: Tuple[str, ...]
    allowed: FrozenSet[str]


BLOCKS: Dict[str, Block] = {
    "aes": Block(("spa_server.py", "spa_client.py"), frozenset((
        "struct", "Callable", "List", "Optional", "Tuple"))),
    "rsa": Block(("spa_server.py", "spa_client.py"), frozenset((
        "DIGESTS", "binascii", "os", "Callable", "List", "Tuple"))),
    "openspa": Block(("spa_server.py", "spa_client.py"), frozenset((
        "Aes", "DIGESTS", "Hmac", "RsaKey", "exclusive_or", "struct", "Callable", "Dict", "List",
        "Tuple"))),
    "digests": Block(("spa_server.py", "spa_client.py"), frozenset((
        "SpaError", "Any", "Callable"))),
    "errors": Block(("spa_server.py", "spa_client.py", "keygen.py"), frozenset()),
    "output": Block(("spa_server.py", "spa_client.py", "keygen.py"), frozenset(("os", "Any"))),
    "files": Block(("spa_server.py", "spa_client.py"), frozenset(("errno", "os", "stat"))),
    "options": Block(("spa_server.py", "spa_client.py"), frozenset((
        "UsageError", "os", "Iterable", "List", "Optional", "Tuple"))),
    "launcher": Block(("spa_server.py", "spa_client.py"), frozenset(("os", "sys"))),
    "hints": Block(("spa_server.py", "spa_client.py"),
                   frozenset(("Callable", "Iterable", "Tuple"))),
}

BEGIN = re.compile(r"# --- shared: (\S+) -- the same text in (.+) --\n")
END = re.compile(r"# --- end shared: (\S+) --\n")
LIKE_A_MARKER = re.compile(r"\s*#\s*-*\s*(end )?shared\s*:", re.IGNORECASE)


class Span(NamedTuple):
    """Where a block stands in a text (both markers included), and the files its marker names."""

    start: int
    end: int
    files: Tuple[str, ...]


def find_spans(text: str) -> Dict[str, Span]:
    """Return the blocks of a text by name; raise ValueError where markers are no pairs."""
    spans: Dict[str, Span] = {}
    name, start = "", 0
    files: Tuple[str, ...] = ()
    offset = 0
    for number, line in enumerate(text.splitlines(True), 1):
        begin, end = BEGIN.fullmatch(line), END.fullmatch(line)
        if begin:
            if name:
                raise ValueError(f"line {number}: {begin.group(1)} begins inside {name}")
            name, start = begin.group(1), offset
            files = tuple(re.split(r", | and ", begin.group(2)))
            if name in spans:
                raise ValueError(f"line {number}: {name} begins for the second time")
        elif end:
            if end.group(1) != name:
                raise ValueError(f"line {number}: {end.group(1)} ends, but did not begin")
            spans[name] = Span(start, offset + len(line), files)
            name = ""
        elif LIKE_A_MARKER.match(line):
            raise ValueError(f"line {number}: looks like a marker, but is not written like one")
        offset += len(line)
    if name:
        raise ValueError(f"{name} does not end")
    return spans


def read_text(path: str) -> str:
    """Return a file's text with its line ends as they are; "" when it does not exist."""
    try:
        with open(path, encoding="utf-8", newline="") as stream:
            return stream.read()
    except FileNotFoundError:
        return ""


def foreign_names(text: str) -> Set[str]:
    """Return the names that a block takes from outside itself, builtins left out.

    Quoted annotations count too: they are names to the type checker and to typing.get_type_hints.
    """
    used: Set[str] = set()
    own = set(dir(builtins)) | {"__name__", "__file__"}

    def walk(table: symtable.SymbolTable, is_module: bool) -> None:
        for symbol in table.get_symbols():
            if is_module and (symbol.is_assigned() or symbol.is_imported()
                              or symbol.is_namespace()):
                own.add(symbol.get_name())
            elif symbol.is_referenced() and (is_module or symbol.is_global()):
                used.add(symbol.get_name())
        for child in table.get_children():
            walk(child, False)

    walk(symtable.symtable(text, "<block>", "exec"), True)
    for node in ast.walk(ast.parse(text)):
        for quoted in quoted_annotations(node):
            for part in ast.walk(ast.parse(quoted.strip(), mode="eval")):
                if isinstance(part, ast.Name):
                    used.add(part.id)
    return used - own


def quoted_annotations(node: ast.AST) -> List[str]:
    """Return the annotations of a node that are written as strings."""
    notes: List[Any] = [getattr(node, "annotation", None), getattr(node, "returns", None)]
    values = [note.value if hasattr(note, "value") else getattr(note, "s", None)  # 3.6, 3.7: s
              for note in notes]
    return [value for value in values if isinstance(value, str)]


def check_block(top: str, name: str, block: Block) -> List[str]:
    """Return what is wrong with one block, in sentences; [] when nothing is."""
    problems: List[str] = []
    texts: Dict[str, str] = {}
    for file in block.files:
        text = read_text(os.path.join(top, file))
        try:
            span = find_spans(text).get(name)
        except ValueError as error:
            problems.append(f"{file}: {error}")
            continue
        if span is None:
            what = "has no block" if text else "does not exist, so it has no block"
            problems.append(f"{file}: {what} {name}")
            continue
        if span.files != block.files:
            problems.append(f"{file}: the marker of {name} names {', '.join(span.files)}, "
                            f"the registry {', '.join(block.files)}")
        texts[file] = text[span.start:span.end]
        foreign = foreign_names(texts[file]) - block.allowed
        if foreign:
            problems.append(f"{file}: block {name} uses {', '.join(sorted(foreign))}, which the "
                            "registry in tests/shared.py does not allow")
    original = block.files[0]
    for file, copy in texts.items():
        if original in texts and copy != texts[original]:
            problems.append(f"{file}: block {name} differs from {original}'s "
                            "(python3 -m tests.shared --write copies it)")
    return problems


def find_problems(top: str = TOP, blocks: Optional[Dict[str, Block]] = None) -> List[str]:
    """Return everything that is wrong with the shared blocks of the scripts in `top`."""
    blocks = BLOCKS if blocks is None else blocks
    problems: List[str] = []
    for name, block in blocks.items():
        problems += [each for each in check_block(top, name, block) if each not in problems]
    for file in sorted(name for name in os.listdir(top) if name.endswith(".py")):
        try:
            spans = find_spans(read_text(os.path.join(top, file)))
        except ValueError as error:
            problems += [each for each in [f"{file}: {error}"] if each not in problems]
            continue
        for name in spans:
            if name not in blocks or file not in blocks[name].files:
                problems.append(f"{file}: block {name} is not in the registry for this file")
    return problems


def write_copies(top: str = TOP, blocks: Optional[Dict[str, Block]] = None) -> List[str]:
    """Copy each block from its first file to the others; return the files that changed."""
    changed: List[str] = []
    for name, block in (BLOCKS if blocks is None else blocks).items():
        source = read_text(os.path.join(top, block.files[0]))
        span = find_spans(source).get(name)
        for file in block.files[1:] if span else ():
            path = os.path.join(top, file)
            text = read_text(path)
            place = find_spans(text).get(name)
            if span is None or place is None:
                continue
            new = text[:place.start] + source[span.start:span.end] + text[place.end:]
            if new != text:
                with open(path, "w", encoding="utf-8", newline="") as stream:
                    stream.write(new)
                changed.append(file)
    return changed


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Copy when asked to, then check; 0 when nothing is wrong."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments not in ([], ["--write"]):
        print("usage: python3 -m tests.shared [--write]", file=sys.stderr)
        return 2
    if arguments:
        for file in write_copies():
            print(f"{file}: written")
    problems = find_problems()
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
