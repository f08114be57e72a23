"""What the tests share: files, Pythons of this machine, skipping with a reason.

Two environment variables choose what live tests do (tests that need root or a peer program):
  SPA_REQUIRE_LIVE=1   a live test that cannot run fails, so that a machine without the peers
                       cannot look like a pass
  SPA_PORTABLE=1       live tests are left out, and only the running Python is tried: for a run
                       with one more Python, when another run has done the rest

`python3 -m tests.support` lists the Pythons that find_pythons() finds.
"""

import atexit
import collections
import contextlib
import functools
import glob
import importlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import unittest
import warnings
from typing import (Any, Callable, Counter, Dict, Iterable, Iterator, List, NamedTuple, Optional,
                    Tuple, TypeVar, Union)

TOP = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = ("spa_server.py", "spa_client.py", "keygen.py")
OLDEST = (3, 6)

# An ordinary user's PATH has no sbin. The server looks there all the same, and so do the tests.
os.environ["PATH"] = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"

T = TypeVar("T")


def captured(main: Callable[[], T]) -> Tuple[T, str, str]:
    """Return what a call of main() returns, and its standard output and standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main()
    return code, out.getvalue(), err.getvalue()


# ------------------------------------------------------------------- files

def write(path: str, content: Union[str, bytes], mode: int = 0o600) -> str:
    """Write a file anew, text as UTF-8, and return its path."""
    data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)
    os.chmod(path, mode)  # of a file that was there already, too, and whatever the umask is
    return path


def read(path: str) -> str:
    """Return what is in a file, nothing when there is none."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""


class DirectoryCase(unittest.TestCase):
    """A test with a directory of its own."""

    def setUp(self) -> None:
        """Make the directory."""
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.directory = os.path.realpath(directory.name)

    def place(self, name: str) -> str:
        """Return the path of a name in the directory."""
        return os.path.join(self.directory, name)


class SharedCase(unittest.TestCase):
    """Tests that share what is made once; it is closed at their end, also if the making fails."""

    kept: contextlib.ExitStack

    @classmethod
    def setUpClass(cls) -> None:
        """Prepare."""
        with contextlib.ExitStack() as stack:
            cls.prepare(stack)
            cls.kept = stack.pop_all()

    @classmethod
    def prepare(cls, stack: contextlib.ExitStack) -> None:
        """Make it; `stack` closes what it is given."""
        raise NotImplementedError

    @classmethod
    def tearDownClass(cls) -> None:
        """Close it."""
        cls.kept.close()


# ------------------------------------------------------------------- what was left open

left_open: List[str] = []  # what this run's ResourceWarnings say


def _show_warning(message: Any, category: Any, *where: Any, **more: Any) -> None:
    """Show a warning as before; a ResourceWarning makes the whole run fail in tests.test_style."""
    if issubclass(category, ResourceWarning):
        left_open.append(str(message))
    _shown_before(message, category, *where, **more)


# No filter can turn these into errors: they come from __del__, whose exceptions are only printed.
_shown_before, warnings.showwarning = warnings.showwarning, _show_warning


# ------------------------------------------------------------------- interpreters

class Python(NamedTuple):
    """One interpreter."""

    version: Tuple[int, ...]
    path: str

    def __str__(self) -> str:
        return "Python " + ".".join(str(part) for part in self.version)


def probe_python(path: str) -> Optional[Python]:
    """Return the interpreter behind a path, or None when that is none, or one too old."""
    code = "import sys; print(*sys.version_info[:3]); print(sys.executable)"
    try:
        answer = run([path, "-I", "-S", "-c", code])
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.splitlines()
    if answer.returncode != 0 or len(lines) != 2:
        return None
    found = Python(tuple(int(word) for word in lines[0].split()), lines[1])
    return found if found.version[:2] >= OLDEST else None


@functools.lru_cache(maxsize=None)
def find_pythons() -> Tuple[Python, ...]:
    """Return every real Python from 3.6 up, each version once, oldest first.

    Looked for among pyenv's and on PATH. A script on PATH that is called python3 is left out: it
    is a version manager's shim, which is slow and leads to one of the others.
    """
    paths = [sys.executable]
    if os.environ.get("SPA_PORTABLE") != "1":
        paths += glob.glob(os.path.expanduser("~/.pyenv/versions/*/bin/python3"))
        for directory in os.get_exec_path():
            paths += glob.glob(os.path.join(glob.escape(directory), "python3.[0-9]"))
            paths += glob.glob(os.path.join(glob.escape(directory), "python3.[0-9][0-9]"))
            paths += glob.glob(os.path.join(glob.escape(directory), "python3"))
    found: Dict[Tuple[int, ...], Python] = {}
    for path in {os.path.realpath(path): path for path in reversed(paths)}.values():
        with open(path, "rb") as stream:
            is_script = stream.read(2) == b"#!"
        python = None if is_script else probe_python(path)
        if python:
            found.setdefault(python.version, python)
    return tuple(sorted(found.values()))


def nearest_python(version: str) -> Python:
    """Return the Python of this minor version, else the nearest."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return min(find_pythons(), key=lambda python: (abs(python.version[1] - minor),
                                                   python.version[0] != major))


# ------------------------------------------------------------------- time

# How long `spa_server.py -V` takes where nothing else runs: on a machine of 2020 with Python 3.11.
START_SECONDS = 0.15
MOST_SLOWNESS = 10.0
PATIENCE = 30.0  # how long such a machine waits for a condition
TIMEOUT = PATIENCE * MOST_SLOWNESS  # for a call that ends by itself, however slow the machine is


def slowness() -> float:
    """Return how many times slower than usual this machine starts a script now: 1 to 10."""
    begin = time.monotonic()
    run([sys.executable, "-I", "-S", os.path.join(TOP, "spa_server.py"), "-V"])
    return min(max(1.0, (time.monotonic() - begin) / START_SECONDS), MOST_SLOWNESS)


def long_enough(seconds: int) -> int:
    """Return the lifetime of a grant, in seconds, that this machine needs for what takes `seconds`.

    A test waits for the end of that grant, so it asks once, before it starts anything else. Where
    the end is not the subject, a long lifetime costs nothing and needs no measuring.
    """
    return round(seconds * slowness())


def wait_for(condition: Callable[[], T], what: Union[str, Callable[[], str]],
             patience: float = PATIENCE, pause: float = 0.02) -> T:
    """Return the first true value of `condition()`; fail naming `what` when none comes in time.

    A machine may become slow at any time. So the first to wait too long measures it, and may go on.
    """
    begin, factor = time.monotonic(), 1.0
    while True:
        late = time.monotonic() > begin + patience * factor
        value = condition()  # also when it is late: a machine that slept gets its chance
        if value:
            return value
        if late:
            factor = slowness()
            if time.monotonic() > begin + patience * factor:
                raise AssertionError("waited %d seconds for %s" % (
                    patience * factor, what if isinstance(what, str) else what()))
        time.sleep(pause)


# ------------------------------------------------------------------- processes

def run(command: List[str], **more: Any) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end and return what it said, as text."""
    return subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, universal_newlines=True, timeout=TIMEOUT, **more)


@functools.lru_cache(maxsize=None)
def compiled(script: str, python: str = sys.executable) -> str:
    """Return the path of a file of the same name, with the script as this Python compiles it.

    Tests start the scripts many hundred times, and most of a start is to compile the text. Python
    runs what begins with the magic number of compiled code, whatever the file's name is.
    """
    directory, pid = tempfile.mkdtemp(prefix="spa-compiled-"), os.getpid()

    def remove() -> None:
        """Remove the directory, unless this is a child that a test has forked."""
        if os.getpid() == pid:
            shutil.rmtree(directory)

    atexit.register(remove)
    os.chmod(directory, 0o755)  # some tests run a script as an ordinary user
    path = os.path.join(directory, os.path.basename(script))
    code = "import py_compile, sys; py_compile.compile(*sys.argv[1:], doraise=True)"
    subprocess.check_call([python, "-I", "-c", code, script, path])
    return path


def as_main(script: str, python: str = sys.executable) -> str:
    """Return statements that run what compiled() makes of a script, behind others in one -c."""
    return (f"\nimport marshal, sys\nsys.argv[0] = {script!r}\n"
            f"with open({compiled(script, python)!r}, 'rb') as stream: code = stream.read()\n"
            "code = marshal.loads(code[12 if sys.version_info < (3, 7) else 16:])\n"
            f"exec(code, {{'__name__': '__main__', '__file__': {script!r}}})")


def manual_complaints(page: str) -> List[bytes]:
    """Return what mandoc and groff have against a manual page; skip where there is neither."""
    commands = [command for command in (["mandoc", "-T", "lint", "-W", "warning"],
                                        ["groff", "-man", "-Tascii", "-ww", "-z"])
                if shutil.which(command[0])]
    if not commands:
        skip("neither mandoc nor groff is here")
    return [line for command in commands for line in subprocess.run(
        command, input=page.encode("ascii"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=TIMEOUT).stdout.splitlines() if b"missing date" not in line]


@contextlib.contextmanager
def hearing_interrupts() -> Iterator[None]:
    """Let programs that are started meanwhile take SIGINT, which a shell's background ignores."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


BLOCKED_RUN = """
import marshal, sys
from _frozen_importlib_external import MAGIC_NUMBER
missing, script = frozenset(sys.argv[1].split(",")), sys.argv[2]
class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in missing or name.partition(".")[0] in missing:
            raise ModuleNotFoundError("No module named %r (blocked)" % name, name=name)
        return None
sys.meta_path.insert(0, Missing)
for name in list(sys.modules):
    if name in missing:
        del sys.modules[name]
sys.argv[:] = sys.argv[2:]
with open(script, "rb") as stream:
    code = stream.read()
if code[:4] == MAGIC_NUMBER:
    code = marshal.loads(code[12 if sys.version_info < (3, 7) else 16:])
else:
    code = compile(code, script, "exec")
main = type(sys)("__main__")
main.__file__ = script
sys.modules["__main__"] = main
exec(code, main.__dict__)
"""


def run_blocked(script: str, arguments: Iterable[str], missing: Iterable[str],
                python: str = sys.executable,
                **more: Any) -> "subprocess.CompletedProcess[str]":
    """Run a script, or one that is compiled, with `python -I -S` and without some modules."""
    return run([python, "-I", "-S", "-c", BLOCKED_RUN, ",".join(missing), script, *arguments],
               **more)


# ------------------------------------------------------------------- skipping with a reason

_skipped: Counter[str] = collections.Counter()


def _tell_skipped(pid: int) -> None:
    """Print what was skipped and why; silent in a child that the tests forked."""
    if os.getpid() == pid:
        print("\nSkipped, and why:", file=sys.stderr)
        for reason, count in sorted(_skipped.items()):
            print(f"  {count:4} x {reason}", file=sys.stderr)


def skip(reason: str, live: bool = False) -> None:
    """Skip the running test; a live test fails instead when SPA_REQUIRE_LIVE=1."""
    portable = os.environ.get("SPA_PORTABLE") == "1"
    if live and not portable and os.environ.get("SPA_REQUIRE_LIVE") == "1":
        raise AssertionError("SPA_REQUIRE_LIVE=1, but this test cannot run: " + reason)
    if not _skipped:
        atexit.register(_tell_skipped, os.getpid())
    _skipped[" ".join(reason.split())] += 1
    raise unittest.SkipTest(reason)


def _needs(find_reason: Callable[[], str], live: bool = True) -> Callable[[T], T]:
    """Return a decorator, for test methods and classes, that skips when there is a reason.

    The reason is looked for when the test is about to run, so importing tests costs nothing. A
    class is stopped before its setUpClass and in each setUp, so that every test counts.
    """
    def reason() -> str:
        if live and os.environ.get("SPA_PORTABLE") == "1":
            return "SPA_PORTABLE=1: no live tests"
        return find_reason()

    def guard(function: Callable[..., Any], stop: bool) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*arguments: Any, **more: Any) -> Any:
            text = reason()
            if not text:
                return function(*arguments, **more)
            return skip(text, live) if stop else None
        return guarded

    def decorate(target: Any) -> Any:
        if not isinstance(target, type):
            return guard(target, stop=True)
        base: Any = target
        base.setUpClass = classmethod(guard(base.setUpClass.__func__, stop=False))
        base.tearDownClass = classmethod(guard(base.tearDownClass.__func__, stop=False))
        base.setUp = guard(base.setUp, stop=True)
        return base
    return decorate


def needs_root(target: T) -> T:
    """Decorate a test, or a class of tests, that only root can run."""
    return _needs(lambda: "" if os.geteuid() == 0 else "needs root")(target)


def needs_packet_sockets(target: T) -> T:
    """Decorate a test, or a class of tests, that hears what this host receives."""
    def find_reason() -> str:
        try:
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()
        except (AttributeError, OSError) as error:
            return f"no packet sockets can be made here: {error}"
        return ""
    return _needs(find_reason)(target)


@functools.lru_cache(maxsize=None)
def _missing(program: str) -> str:
    """Return why the tests cannot use a program; `ip` has to make a host as netns.Host does."""
    if not shutil.which(program):
        return f"{program} is not installed"
    if program != "ip":
        return ""
    name = f"spap{os.getpid()}"
    answers = [run(["ip", "netns", *words]) for words in (
        ["add", name], ["exec", name, "ip", "link", "add", "type", "veth"], ["del", name])]
    failed = [answer.stderr for answer in answers if answer.returncode]
    return "no network namespaces can be made here: " + failed[0] if failed else ""


def needs_programs(*names: str) -> Callable[[T], T]:
    """Return a decorator for a test, or a class of tests, that runs these programs.

    The first reason counts: so all tests that can make no host share one line of the list.
    """
    return _needs(lambda: next(filter(None, map(_missing, names)), ""))


def needs_module(name: str) -> Callable[[T], T]:
    """Return a decorator for a test, or a class of tests, that imports this module."""
    def find_reason() -> str:
        try:
            importlib.import_module(name)
        except ImportError:
            return f"the Python module {name} is not installed"
        return ""
    return _needs(find_reason, live=os.environ.get("SPA_PORTABLE") != "1")


if __name__ == "__main__":
    for each in find_pythons():
        print(each.path)
