"""Live: what our client makes of our server's answers and of real firewalls."""

import unittest
from typing import Tuple

from tests.firewalls import IPTABLES_NFT, NFT, Setup, Site, needs_firewalls
from tests.netns import CLIENT6, KEYS, SERVER4, SERVER6, SPA_CLIENT, STANZA

ALREADY = "answers without a knock: nothing hides it, or an earlier knock still holds"
ACCESS = STANZA + "ANSWER Y\nOPEN_PORTS tcp/22, udp/53\n"
SETUPS = [Setup(NFT, "guard"), Setup(IPTABLES_NFT, "guard"), Setup(NFT, "accept"),
          Setup(IPTABLES_NFT, "accept")]


@needs_firewalls
class AnswerTest(unittest.TestCase):
    """Every wait and --answer, at each firewall."""

    def knock(self, site: Site, *words: str) -> Tuple[int, str]:
        """Return exit code and output of a knock, by default for tcp/22 at the IPv4 address."""
        more = [] if "-A" in words else ["-A", "tcp/22"]
        more += [] if "-D" in words else ["-D", SERVER4]
        return site.client.run_code(*SPA_CLIENT, *KEYS, "-s", *more, *words)

    def test_answers(self) -> None:
        """What was opened, also in both families, and why not: the port, the clock, no server."""
        for setup in SETUPS:
            with self.subTest(setup), Site(setup, access=ACCESS) as site:
                self.assertEqual((0, SERVER4 + ": opened tcp/22 for 300 seconds\n"),
                                 self.knock(site, "--answer", "300"))
                self.assertEqual((0, SERVER6 + ": opened udp/53 for 60 seconds\n"), self.knock(
                    site, "--answer=300", "-A", "udp/53", "-f", "60", "-D", SERVER6))
                code, said = self.knock(site, "-A", "tcp/24", "--answer", "300")
                self.assertEqual((1, "spa_client.py: %s: tcp/24 is not in OPEN_PORTS\n" % SERVER4),
                                 (code, said))
                self.assertEqual((0, ""), self.knock(site))
                site.server.stop()
                code, said = self.knock(site, "--answer", "1")
                self.assertEqual(1, code)
                self.assertIn("%s: no answer (perhaps udp/62201 can't be reached, or" % SERVER4,
                              said)

    def test_clock(self) -> None:
        """The server says by how much; --wait and --check pass it on."""
        with Site(SETUPS[0], access=ACCESS) as site:
            for words in (["--answer", "300"], ["--wait", "300"], ["--check"]):
                for option, word in (("--time-offset-minus", "behind"),
                                     ("--time-offset-plus", "ahead")):
                    code, said = self.knock(site, *words, option, "1000")
                    self.assertEqual(1, code, said)
                    self.assertRegex(said, r"(?m)^(spa_client\.py:|\[!\]) %s: the clock is "
                                     r"\d+ s %s$" % (SERVER4, word))

    def test_waits(self) -> None:
        """A closed port, an open one, and a refusal, which ends the wait."""
        for setup in SETUPS:
            with self.subTest(setup), Site(setup, access=ACCESS) as site:
                for words, expected in ((["--wait", "300"], r"opened after \S+ seconds"),
                                        (["--wait", "300"], ALREADY)):
                    code, said = self.knock(site, *words)
                    self.assertEqual(0, code, said)
                    self.assertRegex(said, r"\A%s: opened tcp/22 for 300 seconds\n"
                                     r"tcp/22 of \S+ %s\n\Z" % (SERVER4, expected))
                self.assertEqual((1, "spa_client.py: %s: tcp/24 is not in OPEN_PORTS\n" % SERVER4),
                                 self.knock(site, "-A", "tcp/24", "--wait", "300"))
                self.assertEqual((0, "yes\n"), self.knock(
                    site, "-D", SERVER6, "--wait", "300", "--exec", "echo", "yes"))

    def test_other_family(self) -> None:
        """A knock by IPv6 does not open for IPv4, and the line says so."""
        with Site(SETUPS[0], access=ACCESS) as site:
            code, said = self.knock(site, "-D", SERVER6, "--wait", "2", "--proxy", SERVER4, "22")
            self.assertEqual(1, code)
            self.assertIn("tcp/22 of %s did not open in 2 seconds: the knock was for IPv6, and the"
                          " wait went by IPv4" % SERVER4, said)

    def test_check(self) -> None:
        """All is well; a port that is open before; a server that does not know the keys."""
        with Site(SETUPS[0], access=ACCESS) as site:
            for words, code, expected in (
                    (["-D", SERVER4], 0, "[+] %s: opened tcp/22 for 300 seconds" % SERVER4),
                    (["-D", SERVER4], 1, "[-] tcp/22 of %s %s" % (SERVER4, ALREADY)),
                    (["-D", SERVER6, "-a", CLIENT6], 0,
                     "[+] %s: reached from %s; it opens for %s, and there is no NAT"
                     % (SERVER6, CLIENT6, CLIENT6)),
                    (["-D", SERVER6, "-a", "2001:db8::1", "--wait", "1"], 1,
                     "[-] %s: reached from %s; it opens for 2001:db8::1, which is not ours: see "
                     "ALLOW_IP or -a" % (SERVER6, CLIENT6)),
                    (["-D", SERVER4, "-A", "tcp/24"], 1,
                     "[!] %s: tcp/24 is not in OPEN_PORTS" % SERVER4),
                    (["-D", SERVER4, "-A", "tcp/24", "--key-hmac", "wrong", "--wait", "1",
                      "--answer", "1"], 1,
                     "[!] tcp/24 of %s did not open in 1 seconds: nothing answers." % SERVER4)):
                with self.subTest(words):
                    got, said = self.knock(site, "--check", *words)
                    self.assertEqual(code, got, said)
                    self.assertIn("\n" + expected, "\n" + said)


if __name__ == "__main__":
    unittest.main()
