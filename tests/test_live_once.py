"""Live: ONE_CONNECTION, a grant that the kernel ends with the first connection that uses it."""

import os
import signal
import sys
import unittest

from tests.firewalls import LATENESS, NFT, SETUPS, Setup, Site, close_host
from tests.netns import (CLIENT4, CLIENT6, INNER4, OTHER4, SERVER4, SERVER6, SPA_CLIENT, STANZA,
                         Gateway, in_parallel)
from tests.support import TOP, needs_programs, needs_root, read, wait_for

ONCE = STANZA + "ONE_CONNECTION Y\n"
KEYGEN = os.path.join(TOP, "keygen.py")
GUARD, ACCEPT = Setup(NFT, "guard"), Setup(NFT, "accept")
GONE = "its one connection has come, or somebody flushed it"
COUNTER = "import socket; s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); " \
    "s.bind(('::', 22)); print('ready', flush=True)\n" \
    "while True: print(s.recv(100), flush=True)"


def knock(site: Site, address: str, server: str, ports: str = "tcp/22") -> None:
    """Open for an address, by a packet that goes to the server's address of that family."""
    site.server.knock(site.client, "-A", ports, "-a", address, "-D", server)


@needs_root
@needs_programs("ip", "nft")
class OnceTest(unittest.TestCase):
    """The first connection comes in and stays; another one needs another knock."""

    def only_one(self, site: Site, source: str, server: str) -> None:
        """Knock, and see that one connection gets in, and lives."""
        first = site.client.connect(server, 22, source)
        self.assertFalse(site.client.reaches(server, 22, source))
        self.assertEqual(0, site.count_grants())
        self.assertTrue(first.answers())

    def test_one_connection(self) -> None:
        """In both modes and in both at once, for an address and for its network."""
        both = "NFT_ACCEPT_CHAINS inet filter input;\n"

        def check(case: "tuple[Setup, str, str]") -> None:
            setup, config, access = case
            with Site(setup, config if setup == ACCEPT else "", ONCE + access) as site:
                if config and setup == GUARD:
                    close_host(site.host, NFT)
                    site.server.configure(setup.config() + config)
                    mark = site.server.mark()
                    site.server.send_signal(signal.SIGHUP)
                    site.server.wait_for("Re-starting fwknopd", mark)
                for source, server in ((CLIENT4, SERVER4), (CLIENT6, SERVER6)):
                    self.assertFalse(site.client.reaches(server, 22, source))
                    for _ in range(2):  # a used grant does not keep the next knock from opening
                        knock(site, source, server)
                        self.assertIn("for one connection", site.server.command("--fw-list")[1])
                        self.only_one(site, source, server)
                self.assertNotIn("for one connection", site.server.command("--fw-list")[1])
                if "PREFIX" in access:  # one connection of all in the network
                    knock(site, CLIENT4, SERVER4)
                    self.only_one(site, OTHER4, SERVER4)

        in_parallel(self, [(GUARD, "", ""), (ACCEPT, "", ""), (GUARD, both, ""),
                           (GUARD, "", "ACCESS_PREFIX4 24\nACCESS_PREFIX6 64\n")], check)

    def test_ordinary_grants_beside_it(self) -> None:
        """Another stanza's grant lets any number in; one for a connection goes first."""
        other = STANZA.replace("KEY ", "KEY other")
        with Site(GUARD, "", ONCE + other) as site:
            keys = ["--key-rijndael", "othertestkey", "--key-hmac", "otherhmackey"]
            knock(site, CLIENT4, SERVER4)
            site.server.knock(site.client, "-A", "tcp/22,tcp/24", "-a", CLIENT4, "-D", SERVER4,
                              keys=keys)
            self.assertEqual(3, site.count_grants())
            for _ in range(3):
                self.assertTrue(site.client.reaches(SERVER4, 22, CLIENT4))
                self.assertEqual(2, site.count_grants())

    def test_never_put_back(self) -> None:
        """Not by the watch, not after a flush of the table, not by the next server."""
        with Site(GUARD, "", ONCE) as site:
            knock(site, CLIENT4, SERVER4, "tcp/22,tcp/24")
            first = site.client.connect(SERVER4, 22, CLIENT4)
            mark = site.server.mark()
            site.host.run("nft", "add", "table", "ip", "other")  # it looks what changed
            site.server.wait_for(GONE, mark)
            self.assertEqual(1, site.count_grants())
            self.assertFalse(site.client.reaches(SERVER4, 22, CLIENT4))
            site.server.stop(signal.SIGKILL)
            site.server.start()
            self.assertIn("Found access rule in inet spa guard for", site.server.log())
            self.assertTrue(first.answers())
            self.assertFalse(site.client.reaches(SERVER4, 22, CLIENT4))
            site.client.connect(SERVER4, 24, CLIENT4)
            self.assertFalse(site.client.reaches(SERVER4, 24, CLIENT4))
        with Site(ACCEPT, "", ONCE) as site:
            knock(site, CLIENT4, SERVER4)
            mark = site.server.mark()
            site.host.run("nft", "flush", "set", "inet", "filter", "spa4_once")
            site.server.wait_for(GONE, mark)
            self.assertFalse(site.client.reaches(SERVER4, 22, CLIENT4))
            knock(site, CLIENT4, SERVER4)
            self.only_one(site, CLIENT4, SERVER4)

    def test_datagrams(self) -> None:
        """All datagrams of the first UDP flow pass, also before an answer; another flow does not.

        So a SYN that has to be sent again passes, too: both are NEW to connection tracking.
        """
        with Site(GUARD, "GUARD_PORTS udp/22;\n", ONCE) as site:
            counter = site.host.start(sys.executable, "-I", "-S", "-c", COUNTER)
            counter.wait_for("ready")
            knock(site, CLIENT4, SERVER4, "udp/22")
            site.client.send(SERVER4, 22, "one", "two", "three", source=CLIENT4)
            counter.wait_for("three")
            self.assertIn("two", counter.output())
            site.client.send(SERVER4, 22, "four", source=CLIENT4)
            knock(site, CLIENT4, SERVER4, "udp/22")
            site.client.send(SERVER4, 22, "five", source=CLIENT4)
            counter.wait_for("five")
            self.assertNotIn("four", counter.output())

    def test_published_ports(self) -> None:
        """A port that the host's own NAT leads elsewhere passes the guard once, too."""
        with Site(GUARD, "", ONCE, cable=Gateway()) as site:
            assert isinstance(site.cable, Gateway)
            site.cable.inner.listen(80)
            site.host.run("nft", "-f", "-", input="table ip docker {\nchain pre { type nat "
                          "hook prerouting priority dstnat\ntcp dport 24 dnat to %s:80\n}\n}\n"
                          % INNER4)
            self.assertFalse(site.client.reaches(SERVER4, 24, CLIENT4))
            knock(site, CLIENT4, SERVER4, "tcp/24")
            first = site.client.connect(SERVER4, 24, CLIENT4)
            self.assertFalse(site.client.reaches(SERVER4, 24, CLIENT4))
            self.assertTrue(first.answers())

    def test_unused(self) -> None:
        """A grant that nobody uses ends in time."""
        with Site(GUARD, "", ONCE.replace("300", "2")) as site:
            knock(site, CLIENT4, SERVER4)
            wait_for(lambda: not site.count_grants(), "its end", 2 + 2 * LATENESS)
            self.assertFalse(site.client.reaches(SERVER4, 22, CLIENT4))

    def test_client(self) -> None:
        """keygen.py writes both stanzas; --wait and --exec try no port, --proxy uses the first."""
        with Site(GUARD, "", ONCE) as site:
            names = [site.host.path("access.conf"), site.host.path("rc")]
            site.host.run(sys.executable, KEYGEN, "gate", "--server", SERVER4, "--access", "tcp/22",
                          "--one-connection", "--access-file", names[0], "--rc-file", names[1])
            mark = site.server.mark()
            site.server.configure(access=read(names[0]))
            site.server.send_signal(signal.SIGHUP)
            site.server.wait_for("Re-starting fwknopd", mark)
            client = [SPA_CLIENT[0], SPA_CLIENT[1], "--rc-file", names[1], "-n", "gate", "-a",
                      CLIENT4, "--no-save-args"]
            try_it = [sys.executable, "-c", "import socket; s = socket.create_connection(('%s', "
                      "22), 5, ('%s', 0)); s.send(b'told'); print(s.recv(9))" % (SERVER4, CLIENT4)]
            said = "spa_client.py: tcp/22 is not tried: that would use up its only connection\n"
            self.assertEqual((0, said), site.client.run_code(*client, "--wait", "3"))
            wait_for(lambda: site.count_grants() == 1, "a grant")
            self.assertEqual("b'told'\n", site.client.run(*try_it))
            self.assertEqual((1, 0), (site.client.run_code(*try_it)[0], site.count_grants()))
            self.assertEqual("b'told'\n", site.client.run(*client, "--exec", *try_it))
            self.assertEqual("through", site.client.run(*client, "--proxy", SERVER4, "22",
                                                        input="through"))
            self.assertEqual(0, site.count_grants())

    @needs_programs("iptables-nft", "iptables-legacy")
    def test_iptables(self) -> None:
        """It can't do that, and the start says so."""
        for setup in SETUPS:
            if setup.backend != NFT:
                with self.subTest(setup=str(setup)), Site(GUARD) as site:
                    site.server.stop()
                    site.server.configure(setup.config(), ONCE)
                    code, text = site.server.command()
                    self.assertEqual(3, code)
                    self.assertIn("access.conf:5: ONE_CONNECTION: expected nftables: iptables "
                                  "can't end a grant when a connection uses it", text)


if __name__ == "__main__":
    unittest.main()
