"""NAT in real firewalls: a client, a gateway with our server on it, and a host behind the gateway.

The inner host says where its connections come from. The gateway forwards nothing by itself, and
listens on the ports that are translated as well: a connection that ends there went astray.
"""

import functools
import itertools
import re
import signal
import sys
import time
import unittest
from typing import Iterable, List, Tuple

from tests import firewalls
from tests.firewalls import ANNOUNCED, NFT, Setup, close_host, launcher, needs_firewalls, six
from tests.netns import (CLIENT4, CLIENT6, ECHO, FWKNOP, GATE4, GATE6, HMAC_KEY, INNER4, INNER6,
                         KEY, KEYS, OTHER4, OTHER6, SECOND4, SERVER4, SERVER6, STANZA, Cable,
                         Gateway, in_parallel)
from tests.support import long_enough, needs_programs, slowness, wait_for
from tests.test_packet import Sender, b64

INNER_PORTS = (22, 8080, 8081)

# Tells of each connection, and sends back what comes.
INNER = ECHO + r"""
import sys

def serve(listener, port):
    while True:
        peer, address = listener.accept()
        print("%s from %s." % (port, address[0].replace("::ffff:", "")), flush=True)
        threading.Thread(target=echo, args=(peer,), daemon=True).start()

for port in sys.argv[1:]:
    threading.Thread(target=serve, args=(make_listener(int(port)), port)).start()
print("listening", flush=True)
threading.Event().wait()  # the threads of a program that ends can start no others
"""


class NatSetup(Setup):
    """A backend in a mode, and NAT."""

    def config(self) -> str:
        """The directives that choose and enable it."""
        forward = "NFT_FORWARD_CHAINS inet filter forward;\n" if self.backend == NFT else ""
        return (super().config().replace("tcp/24;", "tcp/24, tcp/2222;") + forward
                + "ENABLE_IPT_FORWARDING Y;\nENABLE_IPT_LOCAL_NAT Y;\n")


SETUPS = [NatSetup(*setup) for setup in firewalls.SETUPS]
BACKENDS = [setup for setup in SETUPS if setup.mode == "accept"]


class Site(firewalls.Site):
    """Three hosts, the gateway's firewall closed, and our server on it."""

    ports = (22, 24, 2222)
    tables = ("filter", "nat", "mangle")

    def __init__(self, setup: Setup, config: str = "", access: str = "",
                 launcher: Iterable[str] = ()) -> None:
        self.count = 0
        self.gateway = Gateway()
        super().__init__(setup, config, STANZA + access, launcher, self.gateway)

    def prepare(self) -> None:
        """Start the inner host's program, and let the gateway forward nothing by itself."""
        inner = self.gateway.inner
        self.inner = inner.start(sys.executable, "-I", "-S", "-c", INNER, *INNER_PORTS)
        self.inner.wait_for("listening")
        close_host(self.host, self.setup.backend,
                   "drop" if self.setup.mode == "accept" else "accept")

    def knock(self, *options: str, expect: str = " opened ") -> str:
        """Knock with the real client for its first address; return the line with `expect`."""
        mark = self.server.mark()
        text = self.client.run(*FWKNOP, *KEYS, "-a", CLIENT4, "-D", SERVER4, *options)
        self.said = text
        return self.server.wait_for(expect, mark)

    def knock6(self, kind: int, access: str, nat: str = "", seconds: int = 0,
               expect: str = " opened ", address: str = CLIENT6) -> str:
        """Knock for an IPv6 address, which the real client can't."""
        self.count += 1
        mark, extra = self.server.mark(), [b64(nat.encode())] if nat else []
        extra += [b"%d" % seconds] if kind in (3, 4, 6) else []
        packet = Sender(KEY.encode(), HMAC_KEY.encode()).packet(
            "%s,%s" % (address, access), kind, extra, timestamp=int(time.time()),
            rand="%016d" % self.count)
        self.client.send(SERVER6, 62201, packet.decode())
        return self.server.wait_for(expect, mark)

    def seen(self, port: int, address: str, start: int = 0) -> None:
        """Wait until the inner host has had a connection to this port from this address."""
        self.inner.wait_for("%d from %s." % (port, address), start)

    def leads_in(self, outer: int, inner: int, source4: str = CLIENT4,
                 source6: str = CLIENT6) -> None:
        """Check that a port of the gateway leads to the inner host, in each family with a source.

        The inner host is to see the connection come from this source.
        """
        for address, source in ((SERVER4, source4), (SERVER6, source6)):
            if not source:
                continue
            mark = self.inner.mark()
            assert self.client.connect(address, outer).answers()
            self.seen(inner, source, mark)

    def listed(self) -> List[str]:
        """Return the doors of --fw-list."""
        code, text = self.server.command("--fw-list")
        assert code == 0, text
        found = []
        for line in re.findall("(?m)^.* seconds left, .*$", text):
            _, kind, protocol, _, source, destination, rest = line.split(None, 6)
            leads, port = (re.search(pattern, rest) for pattern in (
                r"\*/ to:(\S+) \d+ seconds left", r"^%s dpt:(\d+) " % protocol))
            found.append("%s%s -> %s %s%s" % (
                "" if kind == "ACCEPT" else kind + " ", source, destination,
                "%s/%s" % (protocol, port.group(1)) if port else protocol,
                " to " + leads.group(1) if leads else ""))
        return sorted(found)


def both(*ports: int) -> List[Tuple[str, str, int]]:
    """Return ports of the gateway's outer addresses as targets of a probe."""
    return [("", address, port) for port in ports for address in (SERVER4, SERVER6)]


@needs_firewalls
@needs_programs("fwknop")
class ForwardTest(unittest.TestCase):
    """To the inner host."""

    def test_round_trip(self) -> None:
        """Closed; every port of a knock leads to the inner host; it ends; connections live on."""
        seconds = long_enough(3)

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            with Site(setup) as site:
                self.assertFalse(any(site.client.probe(*both(22, 24))))
                began = time.monotonic()
                site.knock("-A", "tcp/22,tcp/24", "-N", INNER4 + ",8080", "-f", str(seconds))
                site.knock6(4, "tcp/22,tcp/24", INNER6 + ",8080", seconds)
                knocked = time.monotonic()
                connections = [
                    site.client.connect(address, port)
                    for address, port in ((SERVER4, 22), (SERVER4, 24), (SERVER6, 24))
                ]
                site.leads_in(22, 8080)
                elsewhere = [
                    (OTHER4, SERVER4, 22),
                    (OTHER6, SERVER6, 22),
                    ("", SERVER4, 8080),
                    ("", INNER4, 8081),
                    ("", INNER6, 8081),
                    (OTHER4, INNER4, 8080),
                ]
                if setup.backend == NFT:  # its rule knows the inner address, fwknop's does not
                    elsewhere.append(("", SECOND4, 8080))
                self.assertFalse(any(site.client.probe(*elsewhere)), site.rules())
                site.wait_closed(*both(22, 24), earliest=began + seconds, latest=knocked + seconds)
                wait_for(lambda: not site.count_grants(), "the end of all grants")
                self.assertEqual([True] * 3, [each.answers() for each in connections])
                self.assertEqual(0, site.server.stop(), site.server.log())
                self.assertNotRegex(site.rules(), r"FWKNOP_[^G]|spa_nat|forward.*spa")
                self.assertNotRegex(site.server.log(), "internal|failed|not as it should|Somebody")

        in_parallel(self, SETUPS, check)

    def test_log_and_listing(self) -> None:
        """The log has fwknop's names of each kind, and --fw-list each door."""

        def check(setup: Setup) -> None:
            """One backend."""
            with Site(setup, "ENABLE_IPT_SNAT Y;\n") as site:
                said = site.knock("-A", "tcp/22", "-N", INNER4 + ",8080")
                self.assertIn("DNAT 10.55.0.2 -> 0.0.0.0/0 tcp/22 to 10.66.0.2:8080", said)
                nft = setup.backend == NFT
                inner = INNER4 if nft else "0.0.0.0/0"
                self.assertIn("opened FORWARD 10.55.0.2 -> %s tcp/8080, " % inner, said)
                places = {
                    "FORWARD": "inet filter forward" if nft else "FWKNOP_FORWARD",
                    "DNAT": "inet spa_nat prerouting" if nft else "FWKNOP_PREROUTING",
                    "SNAT": "inet spa_nat postrouting" if nft else "FWKNOP_MASQUERADE",
                }
                for kind, place in places.items():
                    self.assertRegex(
                        site.server.log(),
                        r"(?m)^Added %s rule to %s for \S+ -> \S+ tcp/\d+, expires at \d{10}$"
                        % (kind, place))
                self.assertEqual(
                    ["10.55.0.2 -> %s tcp/8080" % inner,
                     "DNAT 10.55.0.2 -> 0.0.0.0/0 tcp/22 to 10.66.0.2:8080",
                     "MASQUERADE %s -> 10.66.0.2 tcp/8080" % (CLIENT4 if nft else "0.0.0.0/0")],
                    site.listed())

        in_parallel(self, BACKENDS, check)

    def test_the_newest_target_wins(self) -> None:
        """A second knock for the same port leads elsewhere at once, and ends when it should."""
        last = long_enough(3)

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            with Site(setup) as site:
                for port, seconds in ((8080, 300), (8081, 200), (8080, last)):
                    nat = ",%d" % port
                    site.knock("-A", "tcp/22", "-N", INNER4 + nat, "-f", str(seconds))
                    site.knock6(4, "tcp/22", INNER6 + nat, seconds)
                    site.leads_in(22, port)
                site.wait_closed(*both(22))
                self.assertNotIn("looking whether", site.server.log())

        in_parallel(self, SETUPS, check)

    def test_what_is_routed_through_goes_on(self) -> None:
        """DNAT leads only packets to the gateway itself, whichever client a packet names."""
        cases = (("", "tcp/22"), ("FORWARD_ALL Y\n", "tcp/9"))

        def check(case: Tuple[Setup, Tuple[str, str]]) -> None:
            """One backend: a key holder names the inner host as the client, and leads to OTHER4."""
            setup, (access, asked) = case
            with Site(setup, access=access) as site:
                inner, host = site.gateway.inner, site.host
                if setup.backend == NFT:
                    host.run("nft", "insert rule inet filter forward iifname eth1 accept")
                else:
                    for program in (setup.backend, six(setup.backend)):
                        host.run(program, "-I", "FORWARD", "-i", "eth1", "-j", "ACCEPT")
                    # A jump like fwknopd's, which a start mends.
                    site.server.stop(signal.SIGKILL)
                    for program in (setup.backend, six(setup.backend)):
                        jump = ("PREROUTING", "-j", "FWKNOP_PREROUTING")
                        host.run(program, "-t", "nat", "-I", *jump)
                    site.server.start()
                    self.assertNotIn("PREROUTING -j FWKNOP_PREROUTING", site.rules())
                outside = site.client.start(sys.executable, "-I", "-S", "-c", INNER, 22, 8080)
                outside.wait_for("listening")
                site.knock("-a", INNER4, "-A", asked, "-N", OTHER4 + ",8080")
                site.knock6(2, asked, OTHER6 + ",8080", address=INNER6)
                for there, gate, source in ((CLIENT4, GATE4, INNER4), (CLIENT6, GATE6, INNER6)):
                    mark = outside.mark()
                    for address, port in ((there, 22), (gate, 22 if access else 8080)):
                        self.assertTrue(inner.connect(address, 22).answers())
                        outside.wait_for("%d from %s." % (port, source), mark)
                        mark = outside.mark()

        in_parallel(self, list(itertools.product(BACKENDS, cases)), check)

    def test_force_nat(self) -> None:
        """Doors lead to the target of the stanza, whatever the packet asks for."""
        access = "FORCE_NAT %s 8080\n"

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            with Site(setup, access=access % INNER4) as site:
                site.knock("-A", "tcp/22,tcp/24")
                site.knock("-A", "tcp/2222", "-N", INNER4 + ",8081")
                for port in (22, 24, 2222):
                    site.leads_in(port, 8080, source6="")
                site.knock6(1, "tcp/22", expect="fd55::2 requested NAT access, but is not enabled")
                # An address of the gateway's own: its own port.
                site.server.stop()
                site.server.configure(access=STANZA + "FORCE_NAT %s 24\n" % SERVER4)
                site.server.start()
                site.knock("-A", "tcp/2222")
                mark = site.inner.mark()
                self.assertTrue(site.client.connect(SERVER4, 2222).answers())
                self.assertEqual("", site.inner.output(mark))

        in_parallel(self, SETUPS, check)

    def test_forward_all(self) -> None:
        """Every port, to one host or to those that the client routes to, with its directives."""
        seconds = long_enough(3)

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            with Site(setup, "ENABLE_IPT_SNAT Y;\n", "FORWARD_ALL Y\n") as site:
                inside = [("", INNER4, 8081), ("", INNER6, 22)]
                self.assertFalse(any(site.client.probe(*inside)))
                site.knock("-A", "tcp/9", "-N", INNER4 + ",9", "-f", "300")
                site.knock6(4, "tcp/9", INNER6 + ",9", 300)
                for port in (22, 8080):  # one is guarded
                    site.leads_in(port, port, GATE4, GATE6)
                self.assertEqual(
                    sorted(
                        "%s%s -> %s all%s" % (kind, client, anywhere, " to " + to if to else "")
                        for client, anywhere, inner in ((CLIENT4, "0.0.0.0/0", INNER4),
                                                        (CLIENT6, "::/0", INNER6))
                        for kind, to in (("DNAT ", inner), ("", ""), ("MASQUERADE ", ""))),
                    [each for each in site.listed() if " all" in each])
                self.assertFalse(site.client.reaches(SERVER4, 8080, source=OTHER4))
                code, text = site.server.command("--fw-flush")
                self.assertEqual(0, code, text)
                wait_for(lambda: not site.count_grants(), "the end of all grants")
                site.server.stop()
                site.server.configure(
                    access=STANZA + "FORWARD_ALL Y\nDISABLE_DNAT Y\nFORCE_SNAT %s\n" % SECOND4)
                site.server.start()
                self.assertFalse(any(site.client.probe(*inside)))
                site.knock("-A", "tcp/9", "-f", str(seconds))
                site.knock6(3, "tcp/9", seconds=seconds)
                for address, port, source in ((INNER4, 8081, SECOND4), (INNER6, 22, GATE6)):
                    mark = site.inner.mark()
                    self.assertTrue(site.client.connect(address, port).answers())
                    site.seen(port, source, mark)
                site.wait_closed(*inside)

        in_parallel(self, SETUPS, check)

    def test_ports_that_are_only_forwarded(self) -> None:
        """DISABLE_DNAT: what the client itself sends to the inner host passes, on its port."""

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            with Site(setup, access="DISABLE_DNAT Y\n") as site:
                site.knock("-A", "tcp/22", "-N", INNER4 + ",8080")
                self.assertTrue(site.client.connect(INNER4, 8080).answers())
                self.assertFalse(
                    any(site.client.probe(("", INNER4, 8081), ("", SERVER4, 22), ("", INNER4, 22))))

        in_parallel(self, SETUPS, check)


@needs_firewalls
@needs_programs("fwknop")
class SourceTest(unittest.TestCase):
    """The source of connections, for an inner host without a way back."""

    def test_translated_sources(self) -> None:
        """Masquerade, an address of the settings, and before both that of the stanza."""
        forced = "FORCE_NAT %s 8080\n" % INNER4
        cases = (
            ("", "", GATE4, GATE6),
            ("SNAT_TRANSLATE_IP %s;\n" % SECOND4, "", SECOND4, GATE6),
            ("", forced + "FORCE_SNAT %s\n" % SECOND4, SECOND4, ""),
            ("SNAT_TRANSLATE_IP %s;\n" % SECOND4, forced + "FORCE_MASQUERADE Y\n", GATE4, ""),
        )

        def check(setup: Setup) -> None:
            """One backend, each case after the other."""
            with Site(setup) as site:
                for line in ("-4", "-6"):
                    site.gateway.inner.run("ip", line, "route", "del", "default")
                for config, access, source4, source6 in cases:
                    site.server.stop()
                    site.server.configure(site.config + "ENABLE_IPT_SNAT Y;\n" + config,
                                          STANZA + access)
                    site.server.start()
                    mark = site.inner.mark()
                    site.knock("-A", "tcp/22", "-N", INNER4 + ",8080", "-f", "300")
                    # Two at the same time: with fwknop's `--to-ports 22` the second one hangs.
                    held = [site.client.connect(SERVER4, 22) for _ in range(2)]
                    self.assertEqual([True] * 2, [each.answers() for each in held])
                    site.seen(8080, source4, mark)
                    if source6:
                        site.knock6(4, "tcp/22", INNER6 + ",8080", 300)
                        self.assertTrue(site.client.connect(SERVER6, 22).answers())
                        site.seen(8080, source6, mark)
                self.assertEqual(0, site.server.stop())
                self.assertNotRegex(site.rules(), "FWKNOP|spa_nat")

        in_parallel(self, BACKENDS, check)


@needs_firewalls
@needs_programs("fwknop")
class LocalTest(unittest.TestCase):
    """To another port of the gateway."""

    def test_local_nat(self) -> None:
        """The port that the client chose, or drew, leads to the one behind it, for its time."""
        seconds = long_enough(3)

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            with Site(setup) as site:
                lasting = ["-f", str(seconds)]
                site.knock("-A", "tcp/22", "--nat-local", "--nat-port", "2200", *lasting)
                site.knock6(6, "tcp/2200", SERVER6 + ",22", seconds)
                for address in (SERVER4, SERVER6):
                    self.assertTrue(site.client.connect(address, 2200).answers())
                self.assertFalse(any(site.client.probe((OTHER4, SERVER4, 2200))))
                site.knock("-A", "tcp/24", "--nat-local", "--nat-rand-port", *lasting)
                drawn = int(re.findall(r"assigned port '(\d+)'", site.said)[0])
                self.assertTrue(site.client.connect(SERVER4, drawn).answers())
                # To a port that is guarded by itself, and by a name of this host's.
                name = "gate.example"
                site.knock("-A", "tcp/24", "--nat-local", "-N", name + ",24", "--nat-port", "2222")
                self.assertTrue(site.client.connect(SERVER4, 2222).answers())
                # A client on this host: the rules are there, though nothing here meets them.
                mark = site.server.mark()
                site.host.run(*FWKNOP, *KEYS, "-a", "127.0.0.1", "-D", "127.0.0.1", "-A", "tcp/22",
                              "--nat-local", "--nat-port", "2203")
                site.server.wait_for(
                    "DNAT 127.0.0.1 -> 0.0.0.0/0 tcp/2203 to 127.0.0.1:22 for ", mark)
                self.assertIn("DNAT 127.0.0.1 -> 0.0.0.0/0 tcp/2203 to 127.0.0.1:22", site.listed())
                site.wait_closed(("", SERVER4, 2200), ("", SERVER6, 2200), ("", SERVER4, drawn))
                self.assertEqual("listening\n", site.inner.output())

        in_parallel(self, SETUPS, check)

    def test_what_is_not_enabled(self) -> None:
        """Each kind of NAT has its directive, and forwarding leads to no port of the gateway."""
        setup = NatSetup(NFT, "guard")
        refused = "requested NAT access, but is not enabled/supported"
        with Site(setup) as site:
            for address in (SERVER4, GATE4, SECOND4, "10.66.0.255", "10.66.0.0", "127.0.0.1",
                            "224.0.0.1", "240.0.0.1", "0.1.2.3"):
                site.knock("-A", "tcp/22", "-N", address + ",24", expect=refused)
            for address in ("127.0.0.1", "10.66.0.0", "10.66.0.255"):
                site.knock("-A", "tcp/22", "--nat-local", "-N", address + ",24", expect=refused)
            site.server.stop()
            for enabled, rejected in (("FORWARDING", "--nat-local"), ("LOCAL_NAT", "-N")):
                config = setup.config().replace("ENABLE", "#ENABLE")
                config += "ENABLE_IPT_%s Y;\n" % enabled
                site.server.configure(config)
                site.server.start()
                site.knock("-A", "tcp/22", rejected, *[INNER4] * (rejected == "-N"), expect=refused)
                site.server.stop()
            self.assertEqual("listening\n", site.inner.output())


@needs_firewalls
@needs_programs("fwknop")
class LifeTest(unittest.TestCase):
    """NAT grants when the server ends, or somebody changes the firewall."""

    def test_kill_and_restart(self) -> None:
        """A killed server's grants end by themselves; a new server goes on with the rest."""
        first = long_enough(2)
        second = 3 * first

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            with Site(setup, "ENABLE_IPT_SNAT Y;\n") as site:
                began = time.monotonic()
                site.knock("-A", "tcp/22", "-N", INNER4 + ",8080", "-f", str(first))
                site.knock6(4, "tcp/24", INNER6 + ",8081", second)
                knocked = time.monotonic()
                before = site.listed()
                site.server.stop(signal.SIGKILL)
                connection = site.client.connect(SERVER4, 22)
                site.wait_closed(("", SERVER4, 22), earliest=began + first, latest=knocked + first)
                self.assertTrue(connection.answers())
                self.assertTrue(site.client.reaches(SERVER6, 24))
                site.server.start()
                found = site.server.log().count("Found ")
                left = [each for each in before if "fd5" in each or "fd6" in each]
                self.assertGreaterEqual(found, len(left))
                self.assertTrue(site.client.reaches(SERVER6, 24))
                self.assertEqual(left, [each for each in site.listed() if each in left])
                site.wait_closed(("", SERVER6, 24), earliest=began + second,
                                 latest=knocked + second)
                wait_for(lambda: not site.count_grants(), "the end of all grants")

        in_parallel(self, SETUPS, check)

    def test_what_somebody_took_is_put_back(self) -> None:
        """NAT chains, jumps, maps and rules."""

        def check(setup: Setup) -> None:
            """One backend, one attack after the other."""
            with Site(setup, "ENABLE_IPT_SNAT Y;\n", launcher=launcher(*ANNOUNCED)) as site:
                site.knock("-A", "tcp/22", "-N", INNER4 + ",8080")
                before = site.listed()
                run = functools.partial(site.host.run, "nft")
                attacks = ["delete table inet spa_nat", "flush map inet spa_nat spa4_dnat",
                           "flush chain inet spa_nat prerouting"]
                if setup.backend != NFT:
                    run = functools.partial(site.host.run, setup.backend, "-t", "nat")
                    attacks = ["-F FWKNOP_PREROUTING",
                               "-D PREROUTING -m addrtype --dst-type LOCAL -j FWKNOP_PREROUTING",
                               "-F FWKNOP_MASQUERADE"]
                for attack in attacks:
                    mark = site.server.mark()
                    run(*([attack] if setup.backend == NFT else attack.split()))
                    site.server.wait_for("back", mark)
                    wait_for(lambda: site.listed() == before, "%s to be mended" % attack)
                    site.leads_in(22, 8080, GATE4, "")
                self.assertEqual(0, site.server.stop())
                self.assertNotRegex(site.rules(), r"FWKNOP_[^G]|spa_nat")

        in_parallel(self, BACKENDS, check)

    def test_reload(self) -> None:
        """Grants stay; new settings without NAT close them, and leave nothing."""

        def check(setup: Setup) -> None:
            """One backend in one mode."""
            with Site(setup) as site:
                site.knock("-A", "tcp/22", "-N", INNER4 + ",8080")
                mark = site.server.mark()
                site.server.send_signal(signal.SIGHUP)
                site.server.wait_for("Got SIGHUP", mark)
                site.knock("-A", "tcp/24", "-N", INNER4 + ",8080")
                led = [("", SERVER4, 22), ("", SERVER4, 24)]
                self.assertEqual([True] * 2, site.client.probe(*led))
                mark = site.server.mark()
                site.server.configure(re.sub("ENABLE_IPT_.*", "", setup.config()))
                site.server.send_signal(signal.SIGHUP)
                site.server.wait_for("the new settings have no place for it", mark)
                site.wait_closed(*led)
                site.knock("-A", "tcp/9", expect="Added access rule")
                self.assertNotRegex(site.rules(), "FWKNOP_(FORW|PRE)|spa_nat|forward.*spa")

        in_parallel(self, SETUPS, check)

    def test_a_flush_reaches_what_earlier_settings_left(self) -> None:
        """--fw-flush and FLUSH_IPT_AT_INIT remove those of another backend, too."""

        def check(case: Tuple[Setup, bool]) -> None:
            """One backend, then none or another one without NAT."""
            setup, other = case
            for at_start in (False, True):
                with Site(setup) as site:
                    site.knock("-A", "tcp/22", "-N", INNER4 + ",8080", "-f", "300")
                    site.knock6(4, "tcp/22", INNER6 + ",8080", 300)
                    site.leads_in(22, 8080)
                    site.server.stop(signal.SIGKILL)
                    config = setup._replace(mode="guard").config().replace("tcp/22, ", "")
                    if other:
                        config = "GUARD_PORTS tcp/24;\nFIREWALL_TYPE %s;\n" % (
                            "iptables" if setup.backend == NFT else "nft")
                    config = re.sub("(ENABLE_IPT|NFT_FORWARD).*", "", config)
                    site.server.configure(config + "FLUSH_IPT_AT_INIT Y;\n" * at_start)
                    if at_start:
                        site.server.start()
                    else:
                        code, text = site.server.command("--fw-flush")
                        self.assertEqual(0, code, text)
                    mark = site.inner.mark()
                    site.client.probe(("", SERVER4, 22), ("", SERVER6, 22))
                    self.assertEqual("", site.inner.output(mark))
                    self.assertNotRegex(site.rules(), r"spa_nat|_exp_\d+ -j DNAT|_exp_.*FORWARD")

        cases = [(BACKENDS[0], False), (BACKENDS[0], True), (BACKENDS[1], False),
                 (BACKENDS[2], False), (BACKENDS[1], True)]
        in_parallel(self, cases, check)

    def test_a_kernel_that_forwards_nothing(self) -> None:
        """The start warns of it as soon as NAT is enabled."""
        with Site(NatSetup(NFT, "guard")) as site:
            self.assertNotIn("is forwarded while", site.server.log())
            site.server.stop()
            site.gateway.forward(0)
            site.server.start()
            lines = ("no IPv4 is forwarded while net.ipv4.ip_forward is 0",
                     "no IPv6 is forwarded while net.ipv6.conf.all.forwarding is 0")
            for line in lines:
                self.assertIn(line, site.server.log())
            for flag in "NY":  # and when a reload enables it
                mark = site.server.mark()
                site.server.configure(
                    site.config.replace("FORWARDING Y", "FORWARDING " + flag))
                site.server.send_signal(signal.SIGHUP)
                site.server.wait_for("Re-starting fwknopd", mark)
                for line in lines:
                    self.assertEqual(flag == "Y", line in site.server.log(mark))


@needs_firewalls
@needs_programs("fwknop")
class NameTest(unittest.TestCase):
    """A host that the client names."""

    def launcher(self, hosts: str, resolver: str) -> Tuple[str, ...]:
        """Return what starts a program with these files in /etc."""
        return (
            "unshare", "-m", "sh", "-c", "mount --bind %s /etc/hosts && "
            'mount --bind %s /etc/resolv.conf && exec "$@"' % (hosts, resolver), "sh")

    def test_names(self) -> None:
        """The server looks names up in the client's family and goes on meanwhile; or it refuses."""
        cable = Cable()  # only for a directory that outlives the site
        try:
            hosts, resolver = cable.server.path("hosts"), cable.server.path("resolv.conf")
            with open(hosts, "w") as file:
                file.write("%s inner.example\n%s inner.example\n" % (INNER6, INNER4))
                file.write("%s gate.example\n127.0.0.1 loop.example\n" % GATE4)
            with open(resolver, "w") as file:  # nobody is there
                file.write("nameserver 10.66.0.77\noptions timeout:4 attempts:1\n")
            with Site(NatSetup(NFT, "accept"), launcher=self.launcher(hosts, resolver)) as site:
                mark = site.server.mark()
                site.knock("-A", "tcp/22", "-N", "inner.example,8080")
                site.server.wait_for("Resolved NAT IP in SPA message", mark)
                site.knock6(2, "tcp/22", "inner.example,8080")
                site.leads_in(22, 8080)
                refused = "requested NAT access, but is not enabled/supported"
                for name in ("gate.example", "loop.example"):
                    site.knock("-A", "tcp/24", "-N", name + ",24", expect=refused)
                began, mark = time.monotonic(), site.server.mark()
                for _ in range(4):
                    site.knock("-A", "tcp/24", "-N", "x.example,24", expect="received with access")
                site.knock("-A", "tcp/24", "-N", "x.example,24", expect="too many NAT hosts")
                site.knock("-A", "tcp/24")
                self.assertTrue(site.client.reaches(SERVER4, 24))
                self.assertLess(time.monotonic(), began + 4 * slowness(), "it waited for names")
                wait_for(lambda: site.server.log(mark).count("Unable to resolve Hostname") == 4,
                         "the end of four look-ups")
                site.knock("-A", "tcp/24", "-N", "inner.example,8080")
                site.server.stop()
                site.server.configure(site.config + "ENABLE_NAT_DNS N;\n")
                site.server.start()
                disabled = "Received Hostname in NAT SPA message, but hostname is disabled."
                for more in ([], ["--nat-local"]):
                    site.knock("-A", "tcp/24", "-N", "inner.example,22", *more, expect=disabled)
        finally:
            cable.close()


if __name__ == "__main__":
    unittest.main()
