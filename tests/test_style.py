"""The promises about how the scripts are written and where they run, checked by machine."""

import ast
import concurrent.futures
import functools
import gc
import itertools
import json
import os
import re
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import unittest
from typing import Any, Callable, Iterator, List, Set, Tuple

from tests.support import (SCRIPTS, TIMEOUT, TOP, compiled, find_pythons, left_open,
                           nearest_python, run, run_blocked, skip, write)

MAX_WIDTH = 100
MAX_FUNCTION = 60
MAX_CLASS = 300
MAX_FAMILY = 400  # lines of a class with all its ancestors in the file
MAX_LINES = {"spa_server.py": 11710, "spa_client.py": 3878, "keygen.py": 1082}
TOP_LEVEL = {"spa_server.py", "spa_client.py", "keygen.py", "tests", "README.md", "LICENSE"}

# Small routers do not have these, so no script may need them to start.
MISSING_ON_ROUTERS = {"logging", "pathlib", "urllib", "ctypes", "asyncio", "email", "uuid"}
# Debian's python3-minimal does not have these. Its argparse is patched to do without gettext and
# shutil, that of others is not: these two cannot be blocked in a run, only looked for in the text.
MISSING_ON_DEBIAN_MINIMAL = {
    "hmac", "secrets", "shlex", "tempfile", "shutil", "getpass", "gettext", "queue", "tarfile",
    "bz2", "gzip", "mmap", "resource", "termios", "ssl", "uuid", "ctypes"}
NEEDED_BY_ARGPARSE = {"gettext", "shutil"}

# What Python itself calls, under names that say all there is to say.
NO_DOCSTRING = {"__init__", "__repr__", "__str__"}
# A function inside a function is documented by the one around it, as long as it is tiny.
TINY_STATEMENTS = 8
# (script, function) that may start a shell: for the administrator's own commands only.
SHELL_ALLOWED: Set[Tuple[str, str]] = set()

# Where a line of output may go wrong: script, arguments, stream, exit code.
UNREAD = (
    ("keygen.py", "", 1, 1), ("keygen.py", "--help", 1, 1), ("keygen.py", "--wrong", 2, 2),
    ("spa_client.py", "--help", 1, 1), ("spa_client.py", "-k", 1, 1),
    ("spa_client.py", "{knock} -T", 1, 1), ("spa_client.py", "--wrong", 2, 2),
    ("spa_client.py", "{knock} -v", 1, 0), ("spa_client.py", "{knock} -v", 2, 0),
    ("spa_server.py", "--help", 1, 1), ("spa_server.py", "--key-gen", 1, 1),
    ("spa_server.py", "{files} -D", 1, 1), ("spa_server.py", "{files} -S", 1, 1),
    ("spa_server.py", "--wrong", 2, 2), ("spa_server.py", "{files} -f -t", 2, 0))

BAR = "# " + "=" * 86
# A text in tests/spec and its sections, such as `knockd.md 1.2` or `fwknop.md 1.2 to 1.6, 1.9`.
CITATION = re.compile(r"\b(\w+)\.md (\d+\.\d+|Appendix [A-Z])"
                      r"((?:(?:,? and|,| to)(?: of)? \d+\.\d+)*)")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def tearDownModule() -> None:
    """Fail when a test left something open: this module is the last one of a whole run."""
    gc.collect()
    if left_open:
        raise AssertionError("left open: " + "; ".join(left_open))


def read_script(name: str) -> str:
    """Return the text of a script; fail the test when it does not exist."""
    path = os.path.join(TOP, name)
    if not os.path.exists(path):
        raise AssertionError(f"{name} does not exist")
    with open(path, "rb") as stream:
        return stream.read().decode("utf-8")


@functools.lru_cache(maxsize=None)
def parse_script(name: str) -> ast.Module:
    """Return the syntax tree of a script."""
    return ast.parse(read_script(name), name)


def last_line(node: ast.AST) -> int:
    """Return the last line of a node (before Python 3.8: nearly)."""
    return max(int(getattr(each, "end_lineno", 0) or getattr(each, "lineno", 0))
               for each in ast.walk(node))


def definitions(node: ast.AST, inside: str = "") -> Iterator[Tuple[Any, str, bool]]:
    """Yield each function and class, its dotted name, and whether it is inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FUNCTIONS + (ast.ClassDef,)):
            name = f"{inside}.{child.name}" if inside else child.name
            yield child, name, isinstance(node, FUNCTIONS)
            yield from definitions(child, name)
        elif not isinstance(child, ast.expr):
            yield from definitions(child, inside)


def is_type_checking(node: ast.AST) -> bool:
    """Say whether this is an `if TYPE_CHECKING:`, whose body never runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) \
        and node.test.id == "TYPE_CHECKING"


def module_statements(body: List[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run at import; a choice between imports is looked into."""
    for node in body:
        if isinstance(node, ast.If) and not is_main_guard(node):
            yield from module_statements(node.orelse if is_type_checking(node)
                                         else node.body + node.orelse)
        elif isinstance(node, ast.Try):
            yield from module_statements(node.body + node.orelse + node.finalbody)
            for handler in node.handlers:
                yield from module_statements(handler.body)
        else:
            yield node


def is_main_guard(node: ast.AST) -> bool:
    """Say whether this is `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Compare) \
        and isinstance(node.test.left, ast.Name) and node.test.left.id == "__name__"


def imported(nodes: List[ast.stmt]) -> List[str]:
    """Return the top-level names of the modules that these import statements load."""
    names: List[str] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name.partition(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append((node.module or ".").partition(".")[0])
    return names


def for_each_script(check: Callable[..., None]) -> Callable[[unittest.TestCase], None]:
    """Return a test that does `check(self, name, text, tree)` with each script, as a subtest."""
    @functools.wraps(check)
    def test(self: unittest.TestCase) -> None:
        for name in SCRIPTS:
            with self.subTest(script=name):
                check(self, name, read_script(name), parse_script(name))
    return test


class TextTest(unittest.TestCase):
    """Each script as its reader finds it."""

    @for_each_script
    def test_lines_are_short_and_ascii(self, name: str, text: str, tree: ast.Module) -> None:
        """Width, alphabet, no tabs, no blanks at a line's end, and not too many lines."""
        lines = text.splitlines()
        self.assertLessEqual(len(lines), MAX_LINES[name])
        bad = [number for number, line in enumerate(lines, 1)
               if len(line) > MAX_WIDTH or re.search(r"[^ -~]|\s$", line)]
        self.assertEqual([], bad, f"{len(bad)} lines are too long, not ASCII or end in a blank")
        self.assertTrue(text.endswith("\n"))

    @for_each_script
    def test_functions_and_classes_are_short(self, name: str, text: str, tree: ast.Module) -> None:
        """A function is at most 60 lines, a class at most 300."""
        for node, dotted, _nested in definitions(tree):
            limit = MAX_CLASS if isinstance(node, ast.ClassDef) else MAX_FUNCTION
            lines = last_line(node) - node.lineno + 1
            self.assertLessEqual(lines, limit, f"{name}:{node.lineno}: {dotted}")

    @for_each_script
    def test_families_are_small(self, name: str, text: str, tree: ast.Module) -> None:
        """A class has at most 400 lines together with its ancestors in the file."""
        classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}

        def family(node: ast.ClassDef) -> Set[str]:
            """Return the names of a class and of its ancestors here."""
            bases = [each.id for each in node.bases if isinstance(each, ast.Name)]
            return {node.name}.union(*(family(classes[base]) for base in bases if base in classes))

        for node in classes.values():
            lines = sum(last_line(classes[each]) - classes[each].lineno + 1
                        for each in family(node))
            self.assertLessEqual(lines, MAX_FAMILY, f"{name}: {node.name}")

    @for_each_script
    def test_everything_has_a_docstring(self, name: str, text: str, tree: ast.Module) -> None:
        """Modules, classes and functions say what the caller gets."""
        self.assertTrue(ast.get_docstring(tree), name)
        bare = []
        for node, dotted, nested in definitions(tree):
            tiny = nested and sum(isinstance(x, ast.stmt) for x in ast.walk(node)) \
                <= TINY_STATEMENTS
            overload = any(isinstance(x, ast.Name) and x.id == "overload"
                           for x in node.decorator_list)
            exempt = tiny or overload or node.name in NO_DOCSTRING
            if not ast.get_docstring(node) and not exempt:
                bare.append(f"{name}:{node.lineno}: {dotted}")
        self.assertEqual([], bare)

    @for_each_script
    def test_no_global_and_no_shell(self, name: str, text: str, tree: ast.Module) -> None:
        """State is passed on, and a shell is started for nothing but what may."""
        for node in ast.walk(tree):
            self.assertNotIsInstance(node, ast.Global, f"{name}:{getattr(node, 'lineno', 0)}")
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                self.assertNotIn(f"{node.value.id}.{node.attr}", {"os.system", "os.popen"})
        for function, dotted, _nested in definitions(tree):
            shells = [node for node in ast.walk(function) if isinstance(node, ast.keyword)
                      and node.arg == "shell" and not is_false(node.value)]
            if shells:
                self.assertIn((name, dotted), SHELL_ALLOWED)

    @for_each_script
    def test_imports(self, name: str, text: str, tree: ast.Module) -> None:
        """Nothing that small systems lack is needed to start, and no script needs another."""
        forbidden = MISSING_ON_ROUTERS | MISSING_ON_DEBIAN_MINIMAL
        scripts = {name.partition(".")[0] for name in SCRIPTS} | {"tests"}
        at_start = imported(list(module_statements(tree.body)))
        self.assertEqual(set(), forbidden.intersection(at_start), name)
        anywhere = imported([node for node in ast.walk(tree) if isinstance(node, ast.stmt)])
        self.assertEqual(set(), scripts.intersection(anywhere), name)

    @for_each_script
    def test_nothing_runs_at_import(self, name: str, text: str, tree: ast.Module) -> None:
        """A script is definitions, constants and imports, and one call under its main guard."""
        allowed = FUNCTIONS + (ast.ClassDef, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign,
                               ast.Pass)
        effects = {"open", "print", "input", "exec", "eval", "exit", "__import__"}
        statements = list(module_statements(tree.body[1:]))
        guard = statements.pop()
        self.assertTrue(is_main_guard(guard), f"{name}: the end is the main guard")
        self.assertEqual("sys.exit(main())", text.splitlines()[-1].strip())
        for node in statements:
            self.assertIsInstance(node, allowed, f"{name}:{node.lineno}")
            if isinstance(node, (ast.Assign, ast.AnnAssign)):
                calls = {each.func.id for each in ast.walk(node)
                         if isinstance(each, ast.Call) and isinstance(each.func, ast.Name)}
                self.assertEqual(set(), calls & effects, f"{name}:{node.lineno}")

    @for_each_script
    def test_contents_and_banners_agree(self, name: str, text: str, tree: ast.Module) -> None:
        """The numbered list in the docstring is that of the banners, and each has its paragraph."""
        contents = re.findall(r"^ {2,3}(\d+)\. (.+)$", ast.get_docstring(tree) or "", re.M)
        lines = text.splitlines()
        banners = []
        for at, line in enumerate(lines):
            title = re.match(r"# (\d+)\. (.+)$", line)
            if not title or lines[at - 1] != BAR:
                continue
            banners.append((title.group(1), title.group(2)))
            after = lines[at + 1:]
            self.assertEqual("#", after[0], f"{name}:{at + 2}")
            paragraph = after[1:after.index(BAR)]
            self.assertTrue(paragraph, f"{name}:{at + 1}: a banner has a paragraph")
            self.assertTrue(all(re.match(r"#( |$)", each) for each in paragraph), line)
        self.assertEqual(contents, banners)
        self.assertEqual([str(n) for n in range(1, len(banners) + 1)], [n for n, _ in banners])
        self.assertEqual(2 * len(banners), lines.count(BAR), f"{name}: bars are for banners")

    @for_each_script
    def test_executable_with_a_portable_first_line(
            self, name: str, text: str, tree: ast.Module) -> None:
        """Each script can be run as it is."""
        self.assertEqual("#!/usr/bin/env python3", text.splitlines()[0])
        mode = os.stat(os.path.join(TOP, name)).st_mode
        self.assertTrue(mode & stat.S_IXUSR, f"{name} is executable")


def is_false(node: ast.AST) -> bool:
    """Say whether this is the constant False (whose node was another before Python 3.8)."""
    return getattr(node, "value", True) is False


class TreeTest(unittest.TestCase):
    """The repository as git sees it: tracked, or new and not ignored."""

    def files(self) -> List[str]:
        """Return the files that exist, relative to the top; skip without git."""
        command = ["git", "-c", "safe.directory=*", "-C", TOP, "ls-files", "-z", "--cached",
                   "--others", "--exclude-standard"]
        try:
            answer = run(command)
        except FileNotFoundError:
            answer = subprocess.CompletedProcess(command, 1, "", "git is not installed")
        if answer.returncode:
            skip("no git, or no repository: what belongs to it is not known")
        return [name for name in answer.stdout.split("\0")
                if name and os.path.exists(os.path.join(TOP, name))]

    def test_the_top_holds_what_one_might_copy_to_a_box(self) -> None:
        """And nothing else, but dot files."""
        tops = {name.split("/")[0] for name in self.files()}
        self.assertEqual(set(), {name for name in tops if name[0] != "."} - TOP_LEVEL)

    def test_no_file_names_a_machine(self) -> None:
        """No path of the machine it was written on, no host to download packages from."""
        pyenv = ".py" + "env"  # put together, so that this file passes as well
        words = ["/ro" + "ot/", "/wo" + "rk/", pyenv, "pypi" + ".org", "python" + "hosted.org",
                 "deb.debian" + ".org", "npmjs" + ".org"]
        searches_pythons = {".ci/run", "tests/support.py"}
        for name in self.files():
            with open(os.path.join(TOP, name), encoding="latin-1") as stream:
                text = stream.read()
            found = [word for word in words if word in text]
            if name in searches_pythons and pyenv in found:
                found.remove(pyenv)
            self.assertEqual([], found, name)

    def test_what_is_cited_is_there(self) -> None:
        """Each citation of a text in tests/spec names a file and headings that exist."""
        texts = {}
        for name in self.files():
            if name.endswith((".py", ".md")):
                with open(os.path.join(TOP, name), encoding="utf-8") as stream:
                    texts[name] = stream.read()
        headings = {name: re.findall(r"(?m)^#+ (\d+\.\d+|Appendix [A-Z])\b", text)
                    for name, text in texts.items()}
        for name, text in texts.items():
            self.assertNotRegex(text, r"\b[Ss]pec\s[#\s]*\d", f"{name}: cite by path")
            for book, first, others in re.findall(CITATION, re.sub(r"\n[ #]*", " ", text)):
                there = headings.get(f"tests/spec/{book}.md", [])
                for section in (first, *re.findall(r"\d+\.\d+", others)):
                    self.assertIn(section, there, f"{name}: {book}.md {section}")


# Every packet that the client can make, opened by the server; and both files read.
PROBE = """
import importlib.util, sys
def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
server, client = load(sys.argv[1], "spa_server"), load(sys.argv[2], "spa_client")
assert server.main(["--exit-parse-config", "-c", sys.argv[3], "-a", sys.argv[4]]) == 0
count = 0
for mode in server.MODES:
    for name, digest in server.DIGESTS.items():
        for hmac_key in (b"", b"secret")[:1 if mode == "LEGACY" else 2]:
            message = client.Message("1234567890123456", "bob", 1700000000, 1, "10.0.0.1,tcp/22")
            data = client.encrypt_salted("legacy" if mode == "LEGACY" else mode, b"key", bytes(8),
                                         client.encode_message(message, name))
            packet = client.seal(data, hmac_key or None, name).encode()
            keys = server.PacketKeys(b"key", mode, hmac_key, digest)
            locks = [(keys.hmacs[server.SALTED_PREFIX], [keys])]
            assert not hmac_key or server.find_authentic(locks, packet, keys.tag_length)
            assert server.unlock(packet, keys)[0].digest_type == name
            count += 1
print(count, "packets")
"""


class AloneTest(unittest.TestCase):
    """Each script alone in a directory, with nothing but a Python."""

    def setUp(self) -> None:
        """Copy each script into a directory of its own."""
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.places = {}
        for name in SCRIPTS:
            place = os.path.join(directory.name, name.partition(".")[0])
            os.mkdir(place)
            if os.path.exists(os.path.join(TOP, name)):
                shutil.copy(os.path.join(TOP, name), place)
            self.places[name] = place

    def check(self, runs: List[Tuple[Any, ...]], start: Any) -> None:
        """Start everything, two at a time; each has to end well and leave nothing behind."""
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda each: start(*each), runs))
        for each, answer in zip(runs, answers):
            with self.subTest(run=" ".join(str(part) for part in each[:3])):
                self.assertEqual(0, answer.returncode, answer.stderr)
                self.assertEqual("", answer.stderr)
                expected = "usage" if each[1] == "--help" else each[0]
                self.assertIn(expected.lower(), answer.stdout.lower())
        for name, place in self.places.items():
            self.assertEqual([name], os.listdir(place))

    def test_every_python(self) -> None:
        """-V and --help, isolated and without site, on every Python that is here."""
        def start(name: str, option: str, python: Any) -> Any:
            return run([python.path, "-I", "-S", name, option], cwd=self.places[name])
        self.check([(name, option, python) for name in SCRIPTS for option in ("-V", "--help")
                    for python in find_pythons()], start)

    def test_output_that_nobody_reads(self) -> None:
        """Fails where it was asked for, and stops no other work: no traceback, no exit code 120.

        At the last flush as well, which is Python's own; PYTHONUNBUFFERED would hide that.
        """
        top = os.path.dirname(self.places["keygen.py"])
        capture, conf, access = (os.path.join(top, name) for name in ("pcap", "conf", "access"))
        for path, text in ((capture, struct.pack("=IHHiIII", 0xa1b2c3d4, 2, 4, 0, 0, 999, 1)),
                           (conf, "PCAP_FILE %s;\n" % capture),
                           (access, "SOURCE ANY\nKEY k\nHMAC_KEY h\n")):
            write(path, text)
        listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(listener.close)
        listener.bind(("127.0.0.1", 0))
        words = {"files": "-c %s -a %s -r {place}" % (conf, access),
                 "knock": "-A tcp/22 -a 192.0.2.1 -D 127.0.0.1 --key-rijndael k -p %d"
                          % listener.getsockname()[1]}
        reader, broken = os.pipe()
        os.close(reader)
        full = os.open("/dev/full", os.O_WRONLY)
        for each in (broken, full):
            self.addCleanup(os.close, each)
        closed = subprocess.PIPE  # by the shell
        ways = [(sys.executable, where, more) for where in (closed, full, broken) for more in (
            {}, {"PYTHONUNBUFFERED": "1"})]  # type: List[Tuple[str, int, Any]]
        ways += [(python.path, full, {}) for python in (find_pythons()[0], find_pythons()[-1])
                 if python.path != sys.executable]

        def start(number: int) -> Any:
            """Run a script; the server's state lies in a directory of its own."""
            (name, arguments, stream, _), (python, where, more) = runs[number]
            close = " %d>&-" % stream if where == closed else ""
            place = os.path.join(top, "run%d" % number)
            script = compiled(os.path.join(TOP, name), python)
            return subprocess.run(
                ["/bin/sh", "-c", 'exec "$0" "$@"' + close, python, script]
                + arguments.format(**words).format(place=place).split(), stdin=subprocess.DEVNULL,
                stdout=where if stream == 1 else subprocess.PIPE,
                stderr=where if stream == 2 else subprocess.PIPE, universal_newlines=True,
                timeout=TIMEOUT, cwd=self.places[name], env=dict(more, HOME=top, PATH=os.defpath))

        runs = list(itertools.product(UNREAD, ways))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(start, range(len(runs))))
        for ((name, arguments, stream, code), (python, where, _)), answer in zip(runs, answers):
            with self.subTest(name, arguments=arguments, stream=stream, where=where, python=python):
                said = (answer.stdout or "") + (answer.stderr or "")
                self.assertEqual(code, answer.returncode, said)
                self.assertNotRegex(said, "Traceback|Exception ignored")
                if code and stream == 1 and "-S" not in arguments:
                    self.assertRegex(answer.stderr, r"(?m)^%s: standard output: .+\n\Z" % name)

    def start_blocked(self, name: str, option: str, system: str, python: Any,
                      missing: List[str]) -> Any:
        """Run a script as if `missing` were not there."""
        script = compiled(os.path.join(TOP, name), python.path)
        return run_blocked(script, [option], missing, python.path, cwd=self.places[name])

    def test_every_openwrt_release(self) -> None:
        """-V and --help without what OpenWrt's python3-light does not have."""
        path = os.path.join(TOP, "tests", "vectors", "openwrt_light_missing.json")
        with open(path, encoding="ascii") as stream:
            releases = json.load(stream)
        self.assertGreaterEqual(len(releases), 8)
        self.check([(name, option, "OpenWrt " + release, nearest_python(facts["python"]),
                     facts["missing"])
                    for release, facts in releases.items() for name in SCRIPTS
                    for option in ("-V", "--help")], self.start_blocked)

    def test_packets_on_every_openwrt_release(self) -> None:
        """Every mode, digest and HMAC from client to server, and a configuration, there as well."""
        place = os.path.dirname(self.places["keygen.py"])
        probe, conf, access = (os.path.join(place, name) for name in ("probe.py", "f", "a"))
        for path, text in ((probe, PROBE), (conf, "FIREWALL_TYPE none;\n"),
                           (access, "SOURCE 10.0.0.0/8\nKEY k\nHMAC_KEY h\n")):
            with open(path, "w") as stream:
                stream.write(text)
            os.chmod(path, 0o600)
        with open(os.path.join(TOP, "tests", "vectors", "openwrt_light_missing.json")) as stream:
            releases = json.load(stream)
        for release, facts in releases.items():
            with self.subTest(release=release):
                python = nearest_python(facts["python"])
                answer = run_blocked(probe, [os.path.join(TOP, "spa_server.py"),
                                             os.path.join(TOP, "spa_client.py"), conf, access],
                                     facts["missing"], python.path)
                self.assertEqual("Configs parsed, exiting.\n77 packets\n", answer.stdout,
                                 answer.stderr)

    def test_debian_minimal(self) -> None:
        """-V and --help without what Debian's python3-minimal does not have."""
        missing = sorted(MISSING_ON_DEBIAN_MINIMAL - NEEDED_BY_ARGPARSE)
        self.check([(name, option, "Debian minimal", nearest_python("3.13"), missing)
                    for name in SCRIPTS for option in ("-V", "--help")], self.start_blocked)

    def test_blocking_blocks(self) -> None:
        """A missing module is missed, or the tests above would prove nothing."""
        path = os.path.join(self.places["keygen.py"], "probe.py")
        for module in ("json", "email.message", "_hashlib"):
            with open(path, "w") as stream:
                stream.write(f"import {module}\n")
            answer = run_blocked(path, [], [module])
            self.assertNotEqual(0, answer.returncode)
            self.assertIn("blocked", answer.stderr)


if __name__ == "__main__":
    unittest.main()
