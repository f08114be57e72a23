"""A knockd.conf on a host, and who serves it, the real knockd or ours; hits, and a flood of them.

    server = Knockd(cable.server, NAMED, DOOR).start(cable.client)
    hit(cable.client, CLIENT4, "7000", "8000", "9000")
    server.wait_for(SESAME % (CLIENT4, "door"))
"""

import os
import re
import signal
import sys
import time
from typing import Iterable, List, Optional

from tests.netns import (COMPILE_BEFORE, OTHER4, SERVER4, SPA_SERVER, STANZA, Host, Process,
                         Server)
from tests.support import compiled, read, wait_for, write

REAL, NAMED = "knockd", "ours, called knockd"
ALONE, BESIDE = "ours, --knockd-conf", "ours, --knockd-conf beside a stanza"
NO_FILES = 'if [ -d /etc/fwknop ]; then mount -t tmpfs none /etc/fwknop; fi; exec "$@"'
ON_ETH0 = "Interface = eth0"
NO_FIREWALL = "FIREWALL_TYPE none;\n"
SESAME = "%s: %s: OPEN SESAME"
READY = "[ready]\nsequence = 1:udp,2:udp\n"  # who knocks at it learns that all before was heard
DATE = re.compile(r"^\[\d{4}-\d\d-\d\d \d\d:\d\d\] ", re.M)

# Sends SYNs with sources that are not its own to a port, for so many seconds unless it is ended
# before, so many in each; prints how many.
FLOOD = """
import os, socket, struct, sys, time
server, port, seconds, rate = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
segment = struct.pack(">HHIIBBHHH", 4000, port, 1, 0, 5 << 4, 2, 1000, 0, 0)
end = struct.pack(">4s", socket.inet_aton(server)) + segment
begin, sent = time.monotonic(), 0
while time.monotonic() < begin + seconds and sent < seconds * rate:
    if sent > (time.monotonic() - begin) * rate:
        time.sleep(0.001)
        continue
    source = b"\\x0b" + os.urandom(3)
    raw.sendto(struct.pack(">BBHHHBBH4s", 0x45, 0, 40, 0, 0, 64, 6, 0, source) + end, (server, 0))
    sent += 1
print(sent)
"""


def is_news(line: str) -> bool:
    """Say whether a line of a log is none that all logs here have, and no warning of a door."""
    return ": ready: " not in line and not line.startswith("[")


class Knockd:
    """A knockd.conf on a host, and who serves it: the real knockd, or ours in one of three."""

    def __init__(self, host: Host, kind: str, doors: str, options: str = ON_ETH0) -> None:
        self.host, self.kind, self.stanza = host, kind, STANZA
        self.directory = host.path("knockd")
        os.mkdir(self.directory)
        self.conf, self.log_file, self.pid_file = (
            os.path.join(self.directory, name) for name in ("knockd.conf", "log", "pid")
        )
        self.configure(doors, options)
        self.process: Optional[Process] = None

    def configure(self, doors: str, options: str = ON_ETH0) -> None:
        """Write the file anew."""
        files = "LogFile = %s\nPidFile = %s\n" % (self.log_file, self.pid_file)
        write(self.conf, "[options]\n%s%s\n%s%s" % (files, options, READY, doors))

    def command(self) -> List[str]:
        """Return how it is started."""
        if self.kind == REAL:
            return ["knockd", "-c", self.conf]
        if self.kind == NAMED:
            name = os.path.join(self.directory, "knockd")
            if not os.path.exists(name):
                script = SPA_SERVER[-1]
                os.symlink(compiled(script) if script in COMPILE_BEFORE else script, name)
            return [sys.executable, name, "-c", self.conf]
        if self.kind == ALONE:
            hidden = ["unshare", "-m", "sh", "-c", NO_FILES, "sh", *SPA_SERVER]
            return [*hidden, "-p", self.pid_file, "-r", self.directory, "--knockd-conf", self.conf]
        files = Server(self.host, NO_FIREWALL, self.stanza).files
        return [*SPA_SERVER, *files, "--knockd-conf", self.conf]

    def start(self, client: Host, *launcher: str) -> "Knockd":
        """Start it, and wait until it hears what the client sends."""
        mark = len(self.log())
        self.process = self.host.start(*launcher, *self.command())

        def ready() -> bool:
            """Say whether it has heard another one."""
            assert self.process is not None
            if self.process.popen.poll() is not None:
                raise AssertionError(self.process.output())
            return bool(re.search("tarting (up|fwknopd main)", self.log()[mark:]))

        wait_for(ready, "a start")
        settle(client, [self])
        return self

    def log(self) -> str:
        """Return its log file."""
        return read(self.log_file)

    def lines(self, start: int = 0) -> List[str]:
        """Return the lines of the log without dates, and without those that tell nothing."""
        lines = DATE.sub("", self.log()[start:]).splitlines()
        return [line for line in lines if line.strip() and is_news(line)]

    def wait_for(self, text: str, start: int = 0) -> None:
        """Wait until the log has a text."""
        wait_for(lambda: text in self.log()[start:], repr((self.kind, text, self.log()[start:])))

    def opened(self, source: str, door: str = "door") -> int:
        """Return how often a source has come to the end of a door's sequence."""
        return self.log().count("] " + SESAME % (source, door))

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it, and return the exit code."""
        assert self.process is not None
        return self.process.end(number)


def settle(client: Host, servers: Iterable[Knockd]) -> None:
    """Wait until each server has heard all that was sent before."""
    left = [(server, server.opened(OTHER4, "ready")) for server in servers]

    def heard() -> bool:
        """Knock once more, and say whether all have heard one within a moment."""
        hit(client, OTHER4, "1:udp", "2:udp")
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            if all(server.opened(OTHER4, "ready") > count for server, count in left):
                return True
            time.sleep(0.005)
        return False

    wait_for(heard, "servers that listen")


def hit(client: Host, source: str, *steps: str, server: str = SERVER4) -> None:
    """Hit ports from an address as knock does: one SYN each, or a datagram."""
    for step in steps:
        port, _, protocol = step.partition(":")
        if protocol == "udp":
            client.send(server, int(port), "x", source=source)
        elif protocol == "open":  # a whole connection
            assert client.reaches(server, int(port), source, seconds=5)
        else:
            client.ask("probe", [(source, server, int(port))], 0)
