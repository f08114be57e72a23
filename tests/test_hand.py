"""--open and --close by hand: their arguments, whose grants are meant, the server's answers."""

import ipaddress
import unittest
from typing import Any

import spa_server as server

TIMES = (("30", 30), ("1s", 1), ("10m", 600), ("1h", 3600), ("2d", 172800), ("8388608", 8388608),
         ("97d", 8380800))
BAD_TIMES = ("", "0", "0h", "h", "1w", "1H", " 1", "1 h", "+1", "1.5h", "98d", "8388609", "\u0661",
             "12345678")
JOE, ANN = "stanza #1, user 'joe'", "stanza #12, user 'x\\x27 user \\x27ann'"
KNOCK, HAND = "stanza #2, a knock sequence", "by hand, root"
MEANT = (  # WHO, source, opener
    ("joe", "10.0.0.1/32", JOE), ("#1", "10.0.0.1/32", JOE), ("10.0.0.1", "10.0.0.1/32", JOE),
    ("10.0.0.1", "10.0.0.0/24", "-"), ("10.0.0.0/8", "10.0.0.1/32", "-"), ("#2", "::1/128", KNOCK),
    ("fd00::1", "fd00::/64", HAND), (HAND, "::1/128", HAND), ("x' user 'ann", "::1/128", ANN),
    ("::ffff:0:0/96", "::ffff:0:1/128", "-"), ("openSSH", "10.0.0.1/32", "openSSH"))
OTHERS = (
    ("jo", "10.0.0.1/32", JOE), ("oe", "10.0.0.1/32", JOE), ("joe'", "10.0.0.1/32", JOE),
    ("'joe'", "10.0.0.1/32", JOE), ("ann", "::1/128", ANN), ("#1", "::1/128", ANN),
    ("#", "::1/128", JOE), ("", "::1/128", JOE), ("a knock sequence", "::1/128", KNOCK),
    ("10.0.0.2", "10.0.0.1/32", JOE), ("::1", "10.0.0.1/32", JOE), ("root", "::1/128", HAND),
    ("010.0.0.1", "10.0.0.1/32", JOE), ("0.0.0.0/0", "0.0.0.0/0", JOE), ("joe", "::/0", JOE))
DOORS = (
    ("10.0.0.1 -> 0.0.0.0/0 tcp/22, 30 seconds left, " + JOE, ("10.0.0.1/32", "tcp", "22")),
    ("once fd00::/64 -> ::/0 udp/53", ("fd00::/64", "udp", "53")),
    ("DNAT 10.0.0.1 -> 0.0.0.0/0 tcp/22 to 10.6.0.2:22", ("10.0.0.1/32", "tcp", "22")),
    ("FORWARD 10.0.0.1 -> 10.6.0.2 */*", ("10.0.0.1/32", "*", "*")),
    ("MASQUERADE 0.0.0.0/0 -> 10.6.0.2 tcp/22", None), ("", None), ("->", None), ("a -> b c", None))


class HandTest(unittest.TestCase):
    """What the functions return."""

    def test_times(self) -> None:
        """Seconds, or an error that shows how times look."""
        for text, seconds in TIMES:
            self.assertEqual(seconds, server.parse_time(text))
        for text in BAD_TIMES:
            with self.subTest(time=text), self.assertRaisesRegex(ValueError, "a time like 30, 10m"):
                server.parse_time(text)

    def test_whose(self) -> None:
        """A user, a stanza, an address or a network; no part of a name, nobody's NAT rule."""
        for rows, expected in ((MEANT, True), (OTHERS, False)):
            for who, source, opener in rows:
                with self.subTest(who=who, source=source, opener=opener):
                    network = ipaddress.ip_network(source)
                    self.assertEqual(expected, server.is_meant(who, network, opener))

    def test_what_to_cut(self) -> None:
        """Source, protocol and port of a door in a text; nothing of what is none."""
        for text, expected in DOORS:
            with self.subTest(text=text):
                found: Any = server.cut_target(text)
                self.assertEqual(expected, found and (str(found[0]),) + found[1:])


if __name__ == "__main__":
    unittest.main()
