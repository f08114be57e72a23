"""Our client against our server: every carrier, NAT, commands, and GPG keys of both kinds."""

import os
import re
import signal
import sys
import time
import unittest

from tests.firewalls import NFT
from tests.gnupg import Keyring
from tests.netns import (CLIENT4, CLIENT6, HMAC_KEY, INNER4, KEYS, SERVER4, SERVER6, SPA_CLIENT,
                         STANZA, Server)
from tests.support import TOP, long_enough, needs_programs, needs_root, read, wait_for
from tests.test_live import LiveTest
from tests.test_live_nat import NatSetup, Site

KNOCK4 = ["-A", "tcp/22", "-D", SERVER4]
KNOCK6 = ["-A", "tcp/22", "-D", SERVER6]
OPENED4, OPENED6 = "opened %s -> " % CLIENT4, "opened %s -> " % CLIENT6
NAMES = "tcp port 62201 or udp port 62201 or icmp"


@needs_root
@needs_programs("ip")
class CarrierTest(LiveTest):
    """Each way of a packet; that the firewall then opens, other tests show."""

    def test_ipv4(self) -> None:
        """All carriers, for our own address, which the client finds."""
        self.cable.server.listen(62201)
        server = self.serve("PCAP_FILTER %s;\nENABLE_SPA_OVER_HTTP Y;\n" % NAMES)
        for words in (["udp"], ["tcp"], ["http"], ["icmp"], ["icmp", "--icmp-type", "8"],
                      ["tcpraw"], ["udpraw"], ["udpraw", "-S", "53"]):
            with self.subTest(words):
                server.knock(self.client, *KNOCK4, "-P", *words, expect=OPENED4)
        server.knock(self.client, *KNOCK4, "-P", "udpraw", "-s", "-Q", "10.55.0.77",
                     expect="opened 10.55.0.77 -> ")
        self.assertNotIn("Replay", server.log())

    def test_ipv6(self) -> None:
        """UDP, TCP and HTTP; the raw ones send nothing there, and say so."""
        self.cable.server.listen(62201)
        server = self.serve("PCAP_FILTER %s;\nENABLE_SPA_OVER_HTTP Y;\n" % NAMES)
        for carrier in ("udp", "tcp", "http"):
            with self.subTest(carrier):
                server.knock(self.client, *KNOCK6, "-P", carrier, expect=OPENED6)
        code, _ = self.client.run_code(*SPA_CLIENT, *KEYS, *KNOCK6, "-P", "icmp")
        self.assertEqual(1, code)

    def test_built_in_servers(self) -> None:
        """What the UDP and TCP servers of ours read, without a packet socket."""
        for config, carrier in (("ENABLE_UDP_SERVER Y;\n", "udp"),
                                ("ENABLE_TCP_SERVER Y;\nPCAP_FILTER tcp port 62201;\n", "tcp")):
            with self.subTest(carrier):
                server = self.serve(config)
                server.knock(self.client, *KNOCK4, "-P", carrier, expect=OPENED4)
                self.assertEqual(0, server.stop())

    def test_command(self) -> None:
        """-C is run, with the time of -f and ports beside it as well."""
        server = Server(self.cable.server, "FIREWALL_TYPE none;\n",
                        STANZA + "ENABLE_CMD_EXEC Y\n").start()
        for words in ([], ["-f", "60"], ["-A", "tcp/1"]):
            path = self.cable.server.path("got")
            server.knock(self.client, "-D", SERVER4, "-C", "touch " + path, *words,
                         expect="command returned 0")
            self.assertTrue(os.path.exists(path))


@needs_root
@needs_programs("ip")
class PassTest(LiveTest):
    """From keygen.py --expires by --import to a knock, and to one that comes too late."""

    def test_pass(self) -> None:
        """It opens while it lasts, for no longer than it lasts, and then no more."""
        server, rc, seconds = self.serve(), self.client.path("rc"), long_enough(6)
        client = [*SPA_CLIENT[:2], "--rc-file", rc]
        made = self.cable.server.run(
            sys.executable, os.path.join(TOP, "keygen.py"), "guest", "--server", SERVER4,
            "--access", "tcp/22", "--expires", f"{seconds}s", "--access-file", server.access_file)
        end = int(re.findall(r"ACCESS_EXPIRE_EPOCH +(\d+)\n", read(server.access_file))[0])
        self.assertIn("spa_server.py -R", made)
        server.send_signal(signal.SIGHUP)
        server.wait_for("Re-reading configs")
        stanza = re.findall(r"(?ms)^\[guest\]\n.*^USE_HMAC +Y\n", made)[0]
        said = self.client.run(*client, "--import", input=stanza)
        self.assertIn(f"\n  spa_client.py --rc-file {rc} -n guest --wait 10\n", said)
        line = server.knock(self.client, "-n", "guest", program=client, keys=[], expect=OPENED4)
        self.assertIn(int(re.findall(r" for (\d+) seconds", line)[0]), range(1, seconds + 1))
        wait_for(lambda: time.time() > end, "the end of the pass")
        server.knock(self.client, "-n", "guest", program=client, keys=[],
                     expect="Access stanza has expired.")


class OurSite(Site):
    """A gateway at which our client knocks, and waits until a port of it answers."""

    def knock(self, *options: str, expect: str = " opened ") -> str:
        """Return the line with `expect`; what the client printed is in `said`."""
        mark = self.server.mark()
        self.said = self.client.run(*SPA_CLIENT, *KEYS, "-a", CLIENT4, "-D", SERVER4, "--wait",
                                    "30", *options)
        return self.server.wait_for(expect, mark)


@needs_root
@needs_programs("ip", "nft")
class NatTest(unittest.TestCase):
    """To a host behind the server, and to another port of it."""

    def test_nat(self) -> None:
        """--wait tries the port outside, and a random one leads to where it was said to lead."""
        with OurSite(NatSetup(NFT, "accept")) as site:
            for port, words in ((2222, ["-A", "tcp/2222", "-N", INNER4 + ":8080"]),
                                (2223, ["-A", "tcp/8080", "-N", INNER4, "--nat-port", "2223"])):
                with self.subTest(words):
                    self.assertFalse(site.client.reaches(SERVER4, port))
                    site.knock(*words)
                    self.assertRegex(site.said, "^tcp/%d of %s opened" % (port, SERVER4))
                    site.leads_in(port, 8080, source6="")
            mark = site.inner.mark()
            site.knock("-A", "tcp/8081", "-N", INNER4, "--nat-rand-port", "-f", "300")
            found = re.match(r"\[\+\] Randomly assigned port '(\d+)' on: '%s,tcp/\1' will grant "
                             r"access to: '%s,8081'\ntcp/\1 of " % (CLIENT4, INNER4), site.said)
            assert found is not None, site.said
            site.seen(8081, CLIENT4, mark)
            site.knock("-A", "tcp/22", "--nat-local", "--nat-port", "2224")
            self.assertRegex(site.said, "^tcp/2224 of ")
            assert site.client.connect(SERVER4, 2224).answers()


@needs_root
@needs_programs("ip", "gpg", "gpgconf")
class GpgTest(LiveTest):
    """Signed and encrypted with keys of both kinds."""

    def test_kinds(self) -> None:
        """RSA packets lose their first characters, those for Curve25519 are sent whole."""
        with Keyring() as ours, Keyring() as theirs:
            signer = ours.generate("client")
            theirs.take(ours, signer)
            theirs.trust(signer)
            for kind in ("curve25519", "rsa2048"):
                recipient = theirs.generate("server" + kind, encrypts=kind)
                ours.take(theirs, recipient)
                server = self.serve("", "SOURCE ANY\nGPG_HOME_DIR %s\nGPG_DECRYPT_ID %s\n"
                                    "GPG_ALLOW_NO_PW Y\nGPG_FINGERPRINT_ID %s\nHMAC_KEY %s\n"
                                    % (theirs.home, recipient, signer, HMAC_KEY))
                words = ["-g", "--gpg-home-dir", ours.home, "--gpg-recipient-key", recipient,
                         "--gpg-signer-key", signer, "--gpg-no-signing-pw", "--key-hmac", HMAC_KEY]
                path = self.client.path("packet")
                with self.subTest(kind):
                    server.knock(self.client, *KNOCK4, "-B", path, keys=words, expect=OPENED4)
                    with open(path) as file:
                        whole = file.read().startswith("hF4D")  # version 3, Curve25519
                    self.assertEqual(kind == "curve25519", whole)
                self.assertEqual(0, server.stop())


if __name__ == "__main__":
    unittest.main()
