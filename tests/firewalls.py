"""Real firewalls on the server's host: each backend in both modes, closed, with our server on it.

    with Site(Setup(NFT, "guard")) as site:
        site.server.knock(site.client, "-A", "tcp/22", "-a", CLIENT4, "-D", SERVER4)
        site.wait_closed(("", SERVER4, 22))
"""

import itertools
import re
import shutil
import sys
import time
from typing import Any, Iterable, List, NamedTuple, Optional, Tuple, TypeVar

from tests.netns import STANZA, Cable, Host, Server
from tests.support import TOP, needs_programs, needs_root, wait_for

T = TypeVar("T")

NFT, IPTABLES_NFT, IPTABLES_LEGACY = "nft", "iptables-nft", "iptables-legacy"
BACKENDS = (NFT, IPTABLES_NFT, IPTABLES_LEGACY)
LATENESS = 1.5  # iptables ends a grant by itself at the next whole second


def launcher(*statements: str) -> List[str]:
    """Return a command that runs `spa_server` after some statements that change it."""
    return [sys.executable, "-I", "-S", "-c", "\n".join([
        "import sys", "sys.dont_write_bytecode = True",
        f"sys.path.insert(0, {TOP!r})", "import spa_server",
        *statements, "sys.exit(spa_server.main(sys.argv[3:]))"])]


# Only an announcement lets it look at its firewall, or, where the kernel announces nothing (legacy
# iptables), each second.
ANNOUNCED = ("spa_server.POLL_SECONDS = spa_server.Firewall.poll_seconds = 3600.0",
             "spa_server.LEGACY_POLL_SECONDS = 1.0")
# As on a kernel that does not let it own the guard's table.
OLD_KERNEL = "spa_server.TABLE_PERSIST = 8"

# The host's own firewall: what comes in and is not established is dropped, nothing is forwarded.
NFT_HOST = """
table inet filter {
  chain input { type filter hook input priority 0; policy drop;
    ct state established,related accept; iifname lo accept; meta l4proto ipv6-icmp accept; }
  chain forward { type filter hook forward priority 0; policy drop;
    ct state established,related accept; }
}
"""
IPTABLES_HOST = """*filter
:INPUT %s
:FORWARD DROP
-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A INPUT -i lo -j ACCEPT
%s-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"""


class Setup(NamedTuple):
    """A backend in a mode."""

    backend: str
    mode: str  # "accept" or "guard"

    def __str__(self) -> str:
        """Return its name in a subtest."""
        return "%s %s" % self

    def config(self) -> str:
        """Return the directives that choose it."""
        lines = ["FIREWALL_TYPE nft;"]
        if self.backend != NFT:
            lines = ["FIREWALL_TYPE iptables;", "FIREWALL_EXE %s;" % shutil.which(self.backend)]
        if self.mode == "guard":
            lines.append("GUARD_PORTS tcp/22, tcp/24;")
        elif self.backend == NFT:
            lines.append("NFT_ACCEPT_CHAINS inet filter input;")
        return "\n".join(lines) + "\n"


SETUPS = [Setup(*pair) for pair in itertools.product(BACKENDS, ("accept", "guard"))]


def six(backend: str) -> str:
    """Return the name of the IPv6 variant."""
    return backend.replace("iptables", "ip6tables")


def close_host(host: Host, backend: str, policy: str = "drop") -> None:
    """Make the host's own firewall, with this policy for incoming packets."""
    if backend == NFT:
        host.run("nft", "-f", "-", input=NFT_HOST.replace("drop", policy, 1))
        return
    for program, more in ((backend, ""), (six(backend), "-A INPUT -p ipv6-icmp -j ACCEPT\n")):
        host.run(program + "-restore", input=IPTABLES_HOST % (policy.upper(), more))


def needs_firewalls(target: Any) -> Any:
    """Decorate a class of tests that use all backends."""
    return needs_root(
        needs_programs("ip", "nft", "iptables-nft", "iptables-legacy", "ip6tables-nft",
                       "ip6tables-legacy")(target))


class Site:
    """Two hosts, or those of another cable, and our server on the one with the firewall."""

    ports: Tuple[int, ...] = (22, 24, 25)  # that the server's host listens on
    tables: Tuple[str, ...] = ("filter", "mangle")

    def __init__(self, setup: Setup, config: str = "", access: str = STANZA,
                 launcher: Iterable[str] = (), cable: Optional[Cable] = None,
                 options: Iterable[str] = ()) -> None:
        self.setup, self.config = setup, setup.config() + config
        self.cable = cable or Cable()
        try:
            self.client, self.host = self.cable.client, self.cable.server
            self.host.listen(*self.ports)
            self.prepare()
            self.server = Server(self.host, self.config, access, launcher=launcher)
            self.server.start(*options)
        except BaseException:
            self.cable.close()
            raise

    def prepare(self) -> None:
        """Close the host before the server is started, unless its guard does."""
        if self.setup.mode == "accept":
            close_host(self.host, self.setup.backend)

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *_: Any) -> None:
        self.cable.close()

    def wait_closed(self, *targets: Tuple[str, str, int], earliest: float = 0.0,
                    latest: float = float("inf")) -> None:
        """Wait until none of the targets answers: not before `earliest`, and by `latest`.

        A busy machine sees it late. So the last probe that reached one counts, by its beginning.
        """
        reached = began = 0.0

        def is_closed() -> bool:
            """Return whether none of them answers."""
            nonlocal reached, began
            reached, began = began, time.monotonic()
            return not any(self.client.probe(*targets, seconds=0.2))

        wait_for(is_closed, lambda: "%s: a closed port in\n%s" % (self.setup, self.rules()))
        assert time.monotonic() > earliest - 0.1, "%s: closed too early" % (self.setup,)
        assert reached < latest + LATENESS, "%s: closed too late" % (self.setup,)

    def rules(self) -> str:
        """Return everything that is in the firewall, each of iptables' rules after its table."""
        if self.setup.backend == NFT:
            return self.host.run("nft", "list", "ruleset")
        return "".join("".join("%s %s\n" % (table, line) for line in text.splitlines())
                       for program in (self.setup.backend, six(self.setup.backend))
                       for table in self.tables
                       for text in [self.host.run(program, "-t", table, "-S")])

    def count_grants(self) -> int:
        """Return how many elements or rules of grants the kernel has."""
        return len(re.findall(r"expires \d|_exp_\d", self.rules()))
