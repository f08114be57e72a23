"""The fuzzer: each target takes its share, faults it has found stay mended, and it finds faults."""

import os
import unittest
from typing import Any, List

import spa_server as server
from tests import fuzz
from tests.fuzz import netlink_message

CASES = 100000 if os.environ.get("SPA_REQUIRE_LIVE") == "1" else 10000

HEAD = b"\1\0\0\0" + server.name_attribute(1, "spa")
CHAIN = b"table ip x {\nchain a {\ntype filter hook input priority 0;\n%b\n}\n}\n"

# Inputs that were faults once: each was an exception that nobody expects.
FOUND = (
    ("digest-cache", b"# <digest>\n# began 5000.000 boot-1 %b 1795370288 5000.000 120\n" % (
        b"9" * 400)),
    ("netlink", netlink_message(server.NFT | 11, HEAD) + netlink_message(3, bytes(4))),
    ("netlink", netlink_message(server.NFT | 11, HEAD + server.name_attribute(2, "guard")
                                + server.attribute(3, b"\0")) + netlink_message(3, bytes(4))),
    ("netlink", netlink_message(server.NFT, b"")),
    ("netlink", netlink_message(server.NEW_ROUTE, bytes(4))),
    ("rules", b"chain x {\ntype filter hook input\n}\n"), ("rules", CHAIN % b"jump a"),
    ("rules", CHAIN % b"tcp dport 22-x accept"), ("rules", b"spa4_\xb2\n"))


class HostileInputTest(unittest.TestCase):
    """No target does with a mutation of valid input what it must not do."""

    def test_mutations(self) -> None:
        """100,000 in the run with all peers, else 10,000; `python3 -m tests.fuzz` tries more."""
        made = fuzz.Run()
        self.addCleanup(made.close)
        made.go(cases=CASES)
        self.assertEqual(list(fuzz.TARGETS), [each.name for each in made.running if each.cases])

    def test_what_was_found(self) -> None:
        """Each input that was a fault once."""
        for name, data in FOUND:
            with self.subTest(name, data=data):
                running = fuzz.Running(name, 0, fuzz.TARGETS)
                self.addCleanup(running.close)
                running.take(data)
                running.check()


class FuzzerTest(unittest.TestCase):
    """It finds what it is for, and the same again."""

    def find(self, feed: Any, seed: int, cases: int = 20000) -> str:
        """Return the fault that is found in a target which does this, "" for none."""
        made = fuzz.Run(seed=seed, targets={"planted": fuzz.Target(
            1, (ValueError,), lambda ground: fuzz.Work([b"valid input\n"], feed))})
        self.addCleanup(made.close)
        try:
            made.go(cases)
        except fuzz.Fault as fault:
            return str(fault)
        return ""

    def test_a_fault(self) -> None:
        """An exception that is not documented, with all that is needed to have it again."""
        def feed(data: bytes) -> None:
            if b"iin" in data:
                raise KeyError("planted")
            if b"x" in data:
                raise ValueError("documented")
        first = self.find(feed, 3)
        self.assertRegex(first, r"^target planted, seed 3, case [0-9]+, input\nb'.*iin")
        self.assertIn("KeyError: 'planted'", first)
        self.assertEqual(first, self.find(feed, 3))
        self.assertNotEqual(first, self.find(feed, 4))
        self.assertEqual("", self.find(len, 3, 2000))

    def test_memory(self) -> None:
        """What is kept of each input grows without end."""
        kept: List[Any] = []
        self.assertIn("memory grows", self.find(lambda data: kept.append([data]), 1, 80000))


if __name__ == "__main__":
    unittest.main()
