"""Two gateways that hand each other every knock, by the rule that README.md shows."""

import os
import re
import signal
import time
import unittest
from typing import List

from tests.netns import (CLIENT4, CLIENT6, GATE4, GATE6, KEYS, OTHER4, OTHER6, SERVER4, SERVER6,
                         SPA_CLIENT, Gateway, Host, Server)
from tests.support import TOP, needs_programs, needs_root, read

PEER4, PEER6 = "10.55.0.9", "fd55::9"  # of the second gateway, in the client's network
FAMILIES = ((SERVER4, PEER4, CLIENT4, OTHER4), (SERVER6, PEER6, CLIENT6, OTHER6))
CONFIG = "FIREWALL_TYPE nft;\nGUARD_PORTS tcp/22;\n"
REPLAY = "Replay detected"


def read_section() -> str:
    """Return the section of README.md."""
    return read(os.path.join(TOP, "README.md")).partition("### More than one gateway\n")[2]


def read_rules(**definitions: str) -> str:
    """Return the nftables file that README.md shows, with other values of its definitions."""
    text = read_section().partition("```\n")[2].partition("```\n")[0]
    for name, value in definitions.items():
        text, count = re.subn(r"(?m)^(define %s = )\S+" % name, r"\g<1>" + value, text)
        assert count == 1, name
    return text


class Pair(Gateway):
    """A client and two gateways in its network, `server` and `inner`, with a link between them.

    The link is eth1 of the first gateway and eth0 of the second.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gates = [self.server, self.inner]
        self.client.run("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth1",
                        "netns", self.inner.name)
        self.batch(self.client, "addr flush dev eth0", "link add br0 type bridge",
                   "link set eth0 master br0", "link set eth1 up master br0", "link set br0 up",
                   "addr add %s/24 dev br0" % CLIENT4, "addr add %s/24 dev br0" % OTHER4,
                   "addr add %s/64 dev br0 nodad" % CLIENT6,
                   "addr add %s/64 dev br0 nodad preferred_lft 0" % OTHER6)
        self.batch(self.inner, "link set eth1 up", "addr add %s/24 dev eth1" % PEER4,
                   "addr add %s/64 dev eth1 nodad" % PEER6)
        for host in self.gates:  # they route: a copy that nobody drops goes back
            self.forward(1, host)
            host.run("sysctl", "-qw", "net.ipv4.conf.all.rp_filter=1")
            host.listen(22)

    def load(self) -> None:
        """Load the rules of README.md on both."""
        self.server.run("nft", "-f", "-", input=read_rules())
        self.inner.run("nft", "-f", "-", input=read_rules(
            outside='"eth1"', link='"eth0"', peer4=GATE4, peer6=GATE6))

    def load_for_one_interface(self) -> None:
        """Load them for gateways without a link, with the rule that the text then names."""
        found = re.search(r"`(iifname \$link ether saddr )\S+( .* drop)`", read_section())
        assert found is not None
        outside = {self.server: "eth0", self.inner: "eth1"}
        macs = {host: host.run("cat", "/sys/class/net/%s/address" % name).strip()
                for host, name in outside.items()}
        for host, peer, peer4, peer6 in ((self.server, self.inner, PEER4, PEER6),
                                         (self.inner, self.server, SERVER4, SERVER6)):
            name = '"%s"' % outside[host]
            text = read_rules(outside=name, link=name, peer4=peer4, peer6=peer6)
            dropping = found[1] + macs[peer] + found[2]
            host.run("nft", "-f", "-", input=re.sub(r"iifname \$link .* drop", dropping, text))


def count_packets(host: Host) -> List[List[int]]:
    """Return for each family how many packets a gateway dropped, and how many it copied."""
    return [[int(each) for each in re.findall(
        r"counter packets (\d+)", host.run("nft", "list", "table", family, "spa_peer"))]
            for family in ("ip", "ip6")]


@needs_root
@needs_programs("ip", "nft")
class GatewaysTest(unittest.TestCase):
    """One knock, two gateways."""

    def setUp(self) -> None:
        """Connect them, and start our server on both gateways."""
        self.pair = Pair()
        self.addCleanup(self.pair.close)
        self.client = self.pair.client

    def serve(self, config: str = "") -> List[Server]:
        """Start our server on both."""
        self.servers = [Server(host, CONFIG + config).start() for host in self.pair.gates]
        return self.servers

    def marks(self) -> List[int]:
        """Return where the logs end now."""
        return [server.mark() for server in self.servers]

    def knock(self, where: str) -> str:
        """Send one knock, whose packet opens for the address that it comes from; return it."""
        path = self.client.path("packet")
        self.client.run(*SPA_CLIENT, *KEYS, "-A", "tcp/22", "-s", "-D", where, "-B", path)
        return read(path).strip()

    def knock_opens_both(self) -> None:
        """A knock at one opens both; sent again to either, from anywhere, both refuse it."""
        for addresses in FAMILIES:
            *gates, client, other = addresses
            for first in gates:
                with self.subTest(first=first):
                    marks = self.marks()
                    packet = self.knock(first)
                    for server, mark in zip(self.servers, marks):
                        server.wait_opened(client, 22, mark)
                    self.assertEqual([True, True, False, False], self.client.probe(
                        *[(source, gate, 22) for source in (client, other) for gate in gates]))
                    for second in gates:
                        marks = self.marks()
                        self.client.send(second, 62201, packet, source=other)
                        for server, mark in zip(self.servers, marks):
                            self.assertIn(other, server.wait_for(REPLAY, mark))
                    self.assertEqual([False, False], self.client.probe(
                        *[(other, gate, 22) for gate in gates]))
            for server in self.servers:
                self.assertEqual(0, server.command("--fw-flush")[0])
        # Each gateway got a knock and two replays of each family, and a copy of the other's.
        for host in self.pair.gates:
            self.assertEqual([[3, 3], [3, 3]], count_packets(host))

    def test_link(self) -> None:
        """Both families, over a link of their own."""
        self.pair.load()
        self.serve()
        self.knock_opens_both()

    def test_one_interface(self) -> None:
        """The same without a link; the peer's copies are told by its MAC."""
        self.pair.load_for_one_interface()
        self.serve()
        self.knock_opens_both()

    def test_hop_limit(self) -> None:
        """A knock that may go no further is copied, so that nobody can keep one from the peer."""
        self.pair.load()
        self.serve()
        self.client.run("sysctl", "-qw", "net.ipv4.ip_default_ttl=1",
                        "net.ipv6.conf.br0.hop_limit=1")
        for where, _, client, _ in FAMILIES:
            marks = self.marks()
            self.knock(where)
            for server, mark in zip(self.servers, marks):
                server.wait_opened(client, 22, mark)

    def test_peer_without_rules(self) -> None:
        """A peer that routes the copy back makes no loop."""
        self.pair.server.run("nft", "-f", "-", input=read_rules())
        first, second = self.serve()
        for where, _, client, _ in FAMILIES:
            self.knock(where)
            for server in (first, second):
                server.wait_opened(client, 22)
        self.assertEqual([[0, 1], [0, 1]], count_packets(first.host))
        self.assertNotIn(REPLAY, first.log() + second.log())

    def test_one_is_dead(self) -> None:
        """The other opens; a restarted one refuses what it missed, if its memory begins anew."""
        self.pair.load()
        first, second = self.serve("ENABLE_DIGEST_PERSISTENCE N;\n")
        second.stop(signal.SIGKILL)
        second.host.run("ip", "link", "set", "eth0", "down")
        mark = first.mark()
        packet = self.knock(SERVER4)
        first.wait_opened(CLIENT4, 22, mark)
        self.assertEqual([True], self.client.probe(("", SERVER4, 22)))
        second.host.run("ip", "link", "set", "eth0", "up")
        time.sleep(1)  # a packet says in which second it was made
        second.start()
        self.client.send(PEER4, 62201, packet)
        second.wait_for("before this replay memory began")
        self.assertEqual([False], self.client.probe(("", PEER4, 22)))
        self.assertNotIn(" opened ", second.log())

    def test_names(self) -> None:
        """Without any rule the client sends a packet of its own to each address of a name."""
        servers = self.serve()
        with self.client.names("".join("%s gates\n%s gates\n" % each[:2] for each in FAMILIES)):
            self.knock("gates")
            for server in servers:
                for client in (CLIENT4, CLIENT6):
                    server.wait_opened(client, 22)
            servers[1].stop(signal.SIGKILL)
            mark = servers[0].mark()
            self.knock("gates")
            servers[0].wait_opened(CLIENT4, 22, mark)


if __name__ == "__main__":
    unittest.main()
