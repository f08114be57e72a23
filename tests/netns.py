"""Two hosts with a cable between them, each a network namespace with a kernel firewall of its own.

    with Cable() as cable:
        server = Server(cable.server, "GUARD_PORTS tcp/22;", STANZA)
        server.start()
        server.knock(cable.client, "-A", "tcp/22", "-a", CLIENT4, "-D", SERVER4)
        cable.client.reaches(SERVER4, 22)

The server is 10.55.0.1 and fd55::1; the client has two addresses of each family. Namespaces carry
the pid of the test run in their names, so that two runs do not meet. Only processes that were
started here are ended, by their pid.

TCP and UDP are done by one agent for each host, a small program that lives as long as the host and
is told what to do in lines of JSON: a probe then costs no start of an interpreter.
"""

import concurrent.futures
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import unittest
from typing import Any, Callable, Iterable, Iterator, List, Optional, Tuple, TypeVar

from tests.support import TIMEOUT, TOP, compiled, wait_for, write

T = TypeVar("T")

SERVER4, SERVER6 = "10.55.0.1", "fd55::1"
CLIENT4, CLIENT6 = "10.55.0.2", "fd55::2"
OTHER4, OTHER6 = "10.55.0.3", "fd55::3"  # the client's second addresses
GATE4, GATE6 = "10.66.0.1", "fd66::1"  # a gateway's inside
SECOND4 = "10.66.0.9"  # there, too
INNER4, INNER6 = "10.66.0.2", "fd66::2"  # the host behind it
CLOSED_SECONDS = 0.3  # no answer for so long means closed: the handshake is between two kernels

SPA_SERVER = [sys.executable, os.path.join(TOP, "spa_server.py")]
SPA_CLIENT = [sys.executable, os.path.join(TOP, "spa_client.py"), "--no-rc-file"]
COMPILE_BEFORE = {SPA_SERVER[1], SPA_CLIENT[1]}  # tests.bench empties it: it measures starts
FWKNOP = ["fwknop", "--no-rc-file", "--no-save-args"]
KEY, HMAC_KEY = "testkey", "hmackey"
KEYS = ["--key-rijndael", KEY, "--key-hmac", HMAC_KEY]
STANZA = f"""SOURCE ANY
KEY {KEY}
HMAC_KEY {HMAC_KEY}
FW_ACCESS_TIMEOUT 300
"""

# What a program that sends back what comes begins with.
ECHO = r"""
import socket, threading

def make_listener(port):
    listener = socket.socket(socket.AF_INET6)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("::", port))
    listener.listen(50)
    return listener

def echo(peer):
    try:
        while True:
            text = peer.recv(65536)
            if not text:
                break
            peer.sendall(text)
    except OSError:
        pass
    peer.close()
"""

# Answers each line of JSON on stdin with one on stdout. The first word is the function to call.
AGENT = ECHO + r"""
import json, select, sys, time

kept = {}

def make_socket(kind, source, address):
    made = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
    if source:
        made.bind((source, 0))
    return made

def serve(listener):
    while True:
        peer = listener.accept()[0]
        threading.Thread(target=echo, args=(peer,), daemon=True).start()

def listen(*ports):
    for port in ports:
        threading.Thread(target=serve, args=(make_listener(port),), daemon=True).start()

def probe(targets, seconds):
    waiting, reached = {}, [False] * len(targets)
    for place, (source, address, port) in enumerate(targets):
        made = make_socket(socket.SOCK_STREAM, source, address)
        made.setblocking(False)
        try:
            made.connect((address, port))
        except BlockingIOError:
            pass
        except OSError:
            continue
        waiting[made] = place
    looks = round(seconds / 0.01)  # not a time: a busy machine may let no process run meanwhile
    while waiting and looks > 0:
        ready = select.select([], list(waiting), [], 0.01)[1]
        looks -= not ready
        for made in ready:
            reached[waiting.pop(made)] = not made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            made.close()
    for made in waiting:
        made.close()
    return reached

def connect(name, source, address, port, seconds):
    made = make_socket(socket.SOCK_STREAM, source, address)
    made.settimeout(seconds)
    try:
        made.connect((address, port))
    except OSError:
        return False
    kept[name] = made
    return say(name, seconds)

def say(name, seconds):
    kept[name].settimeout(seconds)
    text = b"%f" % time.monotonic()
    try:
        kept[name].sendall(text)
        return kept[name].recv(100) == text
    except OSError:
        return False

def send(source, address, port, payloads):
    made = make_socket(socket.SOCK_DGRAM, source, address)
    for payload in payloads:
        made.sendto(payload.encode(), (address, port))
    made.close()

for line in sys.stdin:
    name, arguments = json.loads(line)
    try:
        answer = {"value": globals()[name](*arguments)}
    except Exception as error:
        answer = {"error": repr(error)}
    print(json.dumps(answer), flush=True)
"""


def in_parallel(test: unittest.TestCase, cases: Iterable[T], check: Callable[[T], None]) -> None:
    """Call `check` with each case at the same time, and report each as a subtest.

    For tests whose time is spent in waiting for grants to end: each case has hosts of its own.
    """
    listed = list(cases)
    with concurrent.futures.ThreadPoolExecutor(len(listed)) as pool:
        futures = [pool.submit(check, case) for case in listed]
    for case, future in zip(listed, futures):
        with test.subTest(case=str(case)):
            future.result()


def end_process(popen: "subprocess.Popen[Any]", number: int) -> int:
    """Send a signal to a process, wait for its end, and return its exit code."""
    if popen.poll() is None:
        popen.send_signal(number)
    try:
        popen.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        popen.kill()
        popen.wait()
        raise AssertionError("signal %d did not end process %d" % (number, popen.pid)) from None
    return popen.returncode


class Process:
    """A program in the background, and what it has printed so far."""

    def __init__(self, argv: List[str], log: str) -> None:
        self.log = log
        with open(log, "wb") as out:
            self.popen = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out,
                                          stderr=subprocess.STDOUT)

    def output(self, start: int = 0) -> str:
        """Return what it printed, from character `start` on."""
        with open(self.log, encoding="ascii", errors="replace") as file:
            return file.read()[start:]

    def mark(self) -> int:
        """Return where the output ends now, for `start` of the other methods."""
        return len(self.output())

    def wait_for(self, text: str, start: int = 0) -> str:
        """Wait until one line has `text` and return it; fail with the end of the output."""

        def seen() -> Optional[str]:
            ended = self.popen.poll() is not None
            for line in self.output(start).splitlines(True):
                if text in line and line.endswith("\n"):
                    return line.rstrip("\n")
            if ended:
                raise AssertionError("ended with %s without %r" % (self.popen.returncode, text))
            return None

        try:
            found = wait_for(seen, repr(text))
        except AssertionError as error:
            last = "\n".join(self.output().splitlines()[-60:])
            raise AssertionError("%s in:\n%s" % (error, last)) from None
        assert found is not None
        return found

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, wait for the end, and return the exit code."""
        return end_process(self.popen, number)


class Connection:
    """A TCP connection that an agent keeps."""

    def __init__(self, host: "Host", name: str) -> None:
        self.host, self.name = host, name

    def answers(self, seconds: float = TIMEOUT) -> bool:
        """Return whether what is said comes back."""
        return bool(self.host.ask("say", self.name, seconds))


class Host:
    """One namespace."""

    numbers = itertools.count()

    def __init__(self, name: str, directory: str) -> None:
        self.name, self.directory = name, directory
        self.started = []  # type: List[Process]
        self.agent = None  # type: Optional[subprocess.Popen[str]]
        self.lock = threading.Lock()
        subprocess.check_call(["ip", "netns", "add", name])

    def path(self, name: str) -> str:
        """Return the path of a file or directory that nobody has yet."""
        return os.path.join(self.directory, "%s-%d-%s" % (self.name, next(self.numbers), name))

    def command(self, argv: Iterable[Any]) -> List[str]:
        """Return `argv` so that it runs in this namespace; its process becomes the program."""
        words = [compiled(word) if word in COMPILE_BEFORE else str(word) for word in argv]
        return ["ip", "netns", "exec", self.name, *words]

    def run_code(self, *argv: Any, **options: Any) -> Tuple[int, str]:
        """Run a program to its end; return exit code and output, errors included."""
        text = options.pop("input", "")
        environment = dict(os.environ, HOME=self.directory)
        done = subprocess.run(self.command(argv), input=text.encode(), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=TIMEOUT, env=environment, **options)
        return done.returncode, done.stdout.decode("ascii", "replace")

    def run(self, *argv: Any, **options: Any) -> str:
        """Return the output of a program that must not fail."""
        code, text = self.run_code(*argv, **options)
        if code:
            raise AssertionError("%s ended with %d:\n%s" % (" ".join(map(str, argv)), code, text))
        return text

    def start(self, *argv: Any) -> Process:
        """Start a program in the background."""
        process = Process(self.command(argv), self.path("log"))
        self.started.append(process)
        return process

    def ask(self, *words: Any) -> Any:
        """Let the agent do something, and return what it answers."""
        with self.lock:
            if self.agent is None:
                self.agent = subprocess.Popen(
                    self.command([sys.executable, "-I", "-S", "-c", AGENT]), stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, universal_newlines=True)
            assert self.agent.stdin and self.agent.stdout
            self.agent.stdin.write(json.dumps([words[0], words[1:]]) + "\n")
            self.agent.stdin.flush()
            answer = json.loads(self.agent.stdout.readline() or '{"error": "it is dead"}')
        if "error" in answer:
            raise AssertionError("agent: %s: %s" % (words[0], answer["error"]))
        return answer["value"]

    def listen(self, *ports: int) -> None:
        """Serve these TCP ports: what is sent comes back."""
        self.ask("listen", *ports)

    def probe(self, *targets: Tuple[str, str, int], seconds: float = CLOSED_SECONDS) -> List[bool]:
        """Return for each (source or "", address, port) whether TCP connects, all at once."""
        answer = self.ask("probe", targets, seconds)
        return [bool(each) for each in answer]

    def reaches(self, address: str, port: int, source: str = "",
                seconds: float = CLOSED_SECONDS) -> bool:
        """Return whether a TCP connection is made within `seconds`."""
        return self.probe((source, address, port), seconds=seconds)[0]

    def connect(self, address: str, port: int, source: str = "") -> Connection:
        """Return a connection that answers; try until there is one."""
        name = str(next(self.numbers))
        wait_for(lambda: self.ask("connect", name, source, address, port, 0.5),
                 "a connection to %s port %d" % (address, port))
        return Connection(self, name)

    def send(self, address: str, port: int, *payloads: str, source: str = "") -> None:
        """Send UDP datagrams."""
        self.ask("send", source, address, port, payloads)

    @contextlib.contextmanager
    def names(self, text: str) -> Iterator[None]:
        """Let the host have this /etc/hosts for a while (ip-netns(8))."""
        directory = "/etc/netns/" + self.name
        os.makedirs(directory)
        try:
            write(directory + "/hosts", text, 0o644)
            yield
        finally:
            shutil.rmtree(directory)

    def remove(self) -> None:
        """End what was started, and take the namespace away."""
        for process in self.started:
            end_process(process.popen, signal.SIGKILL)
        if self.agent is not None:
            end_process(self.agent, signal.SIGKILL)
            for pipe in (self.agent.stdin, self.agent.stdout):
                if pipe:
                    pipe.close()
        subprocess.call(["ip", "netns", "del", self.name])


class Cable:
    """A client and a server, connected."""

    numbers = itertools.count(1)

    def __init__(self) -> None:
        self.temporary = tempfile.TemporaryDirectory(prefix="spa-test-")
        number = "%d-%d" % (os.getpid(), next(Cable.numbers))
        self.client = Host("spac" + number, self.temporary.name)
        self.server = Host("spas" + number, self.temporary.name)
        self.plug()

    def plug(self) -> None:
        """Connect both hosts; also again, after `unplug`."""
        subprocess.check_call(
            ["ip", "link", "add", "eth0", "netns", self.client.name, "type", "veth",
             "peer", "name", "eth0", "netns", self.server.name])
        for host, fours, sixes in ((self.client, (CLIENT4, OTHER4), (CLIENT6, OTHER6)),
                                   (self.server, (SERVER4,), (SERVER6,))):
            lines = ["link set lo up", "link set eth0 up"]
            lines += ["addr add %s/24 dev eth0" % address for address in fours]
            lines += ["addr add %s/64 dev eth0 nodad" % sixes[0]]
            lines += [
                "addr add %s/64 dev eth0 nodad preferred_lft 0" % address  # only when asked for
                for address in sixes[1:]
            ]
            host.run("ip", "-batch", "-", input="\n".join(lines) + "\n")

    def unplug(self) -> None:
        """Delete the interfaces of both."""
        self.server.run("ip", "link", "del", "eth0")

    def __enter__(self) -> "Cable":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take both hosts away."""
        self.client.remove()
        self.server.remove()
        self.temporary.cleanup()


class Gateway(Cable):
    """A third host behind the server of a cable, which routes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Host(self.server.name.replace("spas", "spai"), self.temporary.name)
        link = ["ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth0"]
        self.server.run(*link, "netns", self.inner.name)
        self.batch(self.server, "link set eth1 up", "addr add %s/24 dev eth1" % GATE4,
                   "addr add %s/24 dev eth1" % SECOND4, "addr add %s/64 dev eth1 nodad" % GATE6)
        self.batch(self.inner, "link set lo up", "link set eth0 up",
                   "addr add %s/24 dev eth0" % INNER4, "addr add %s/64 dev eth0 nodad" % INNER6,
                   "route add default via %s" % GATE4, "route add default via %s" % GATE6)
        self.batch(self.client, "route add 10.66.0.0/24 via " + SERVER4,
                   "route add fd66::/64 via " + SERVER6)
        self.forward(1)

    @staticmethod
    def batch(host: Host, *lines: str) -> None:
        """Let `ip` do these lines on a host."""
        host.run("ip", "-batch", "-", input="\n".join(lines) + "\n")

    def forward(self, flag: int, host: Optional[Host] = None) -> None:
        """Let the kernel of the gateway, or of another host, forward, or not."""
        names = ("net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding")
        (host or self.server).run("sysctl", "-qw", *["%s=%d" % (name, flag) for name in names])

    def close(self) -> None:
        """Take all three hosts away."""
        self.inner.remove()
        super().close()


class Server:
    """spa_server.py on a host, with its files."""

    READY = "Starting fwknopd main event loop."

    def __init__(self, host: Host, config: str, access: str = STANZA, *options: str,
                 launcher: Iterable[str] = ()) -> None:
        self.host, self.options, self.launcher = host, list(options), list(launcher)
        self.directory = host.path("server")
        os.mkdir(self.directory)
        self.config_file = os.path.join(self.directory, "fwknopd.conf")
        self.access_file = os.path.join(self.directory, "access.conf")
        self.configure(config, access)
        self.process = None  # type: Optional[Process]

    def configure(self, config: Optional[str] = None, access: Optional[str] = None) -> None:
        """Write the files anew."""
        for path, text in ((self.config_file, config), (self.access_file, access)):
            if text is not None:
                write(path, text)

    @property
    def files(self) -> List[str]:
        """The options that name its files."""
        return ["-c", self.config_file, "-a", self.access_file,
                "-r", os.path.join(self.directory, "run")]

    def launch(self, *options: str) -> Process:
        """Start it, and do not wait."""
        self.process = self.host.start(*self.launcher, *SPA_SERVER, *self.files, *self.options,
                                       *options)
        return self.process

    def start(self, *options: str) -> "Server":
        """Start it, and wait until it serves."""
        self.launch(*options).wait_for(self.READY)
        return self

    def command(self, *options: str) -> Tuple[int, str]:
        """Return exit code and output of another run with the same files: -S, --fw-list."""
        return self.host.run_code(*SPA_SERVER, *self.files, *options)

    def running(self) -> Process:
        """Return its process, which must have been started."""
        assert self.process is not None
        return self.process

    def mark(self) -> int:
        """Return where its log ends now."""
        return self.running().mark()

    def log(self, start: int = 0) -> str:
        """Return its log, from character `start` on."""
        return self.running().output(start)

    def wait_for(self, text: str, start: int = 0) -> str:
        """Return the first line with `text` after `start`; wait for it."""
        return self.running().wait_for(text, start)

    def wait_opened(self, address: str, port: int, start: int = 0) -> None:
        """Wait until it has opened a TCP port for an address."""
        everywhere = "::/0" if ":" in address else "0.0.0.0/0"
        self.wait_for(" opened %s -> %s tcp/%d for " % (address, everywhere, port), start)

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        self.running().popen.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it, and return the exit code."""
        return self.running().end(number)

    def knock(self, client: Host, *options: str, program: List[str] = SPA_CLIENT,
              keys: List[str] = KEYS, expect: str = " opened ") -> str:
        """Run a client, and return the line with `expect` that it makes in the server's log."""
        mark = self.mark()
        client.run(*program, *keys, *options)
        return self.wait_for(expect, mark)


def start_fwknopd(host: Host, access: str, config: str = "PCAP_INTF eth0;\n",
                  digests: str = "") -> Process:
    """Start the real server in the foreground, and return it when it listens."""
    directory = host.path("fwknopd")
    os.mkdir(directory, 0o700)
    if digests:
        write(directory + "/digest.cache", digests)
    daemon = host.start(
        "fwknopd", "-f", "-c", write(os.path.join(directory, "fwknopd.conf"), config),
        "-a", write(os.path.join(directory, "access.conf"), access), "-r", directory,
        "-p", directory + "/pid", "-d", directory + "/digest.cache")
    daemon.wait_for(Server.READY)
    return daemon


class CableCase(unittest.TestCase):
    """A test with two hosts of its own."""

    def setUp(self) -> None:
        """Connect them."""
        self.cable = Cable()
        self.addCleanup(self.cable.close)
        self.client, self.host = self.cable.client, self.cable.server
