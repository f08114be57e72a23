"""The fuzzer: each target takes its share, faults it has found stay mended, and it finds faults."""

import os
import unittest
from typing import Any, List, Tuple
from unittest import mock

import spa_client as client
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
    ("netlink", netlink_message(server.NLMSG_ERROR, b"\0\0\0\x80" + bytes(16))),
    ("rules", b"chain x {\ntype filter hook input\n}\n"), ("rules", CHAIN % b"jump a"),
    ("rules", CHAIN % b"tcp dport 22-x accept"), ("rules", b"spa4_\xb2\n"))


# Mistakes: a target, and what is put in place of a part that it goes through.
PLANTED: Tuple[Tuple[str, Any, str, Any], ...] = (
    ("packet", server, "find_authentic", lambda locks, *_: [
        each for _, owners in locks for each in owners]),
    ("packet-without-hmac", server.ReplayMemory, "remember", lambda *_: None),
    ("plaintext", server, "check_policy", lambda *_: None),
    ("knock", server.Sequence, "is_step", lambda self, index, step: (
        index == 1 or self.steps[index:index + 1] == (step,))),
    ("kernel-filter", server, "payload_filter", lambda http: server.Comparison(
        8, 1, 0x41, 0x7A, behind=server.PAYLOAD)),
    ("openspa", server.RsaKey, "verify", lambda *_: True),
    ("digest-cache", server.ReplayMemory, "check_unknown", lambda *_: None),
    ("access-conf", server.Line, "error", lambda self, text: server.ConfigError(self.value)),
    ("answer-datagram", client.Question, "decode", lambda *_: (True, "opened")),
    ("pasted-stanza", client, "RUNS", ()))


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

    def test_planted_mistakes(self) -> None:
        """Each would let somebody in, lock somebody out, or show a key."""
        for name, owner, attribute, mistake in PLANTED:
            with self.subTest(name), mock.patch.object(owner, attribute, mistake), \
                    self.assertRaises(fuzz.Fault):
                made = fuzz.Run([name])
                self.addCleanup(made.close)
                made.go(20000)

    def test_memory(self) -> None:
        """What is kept of each input grows without end."""
        kept: List[Any] = []
        self.assertIn("memory grows", self.find(lambda data: kept.append([data]), 1, 80000))


if __name__ == "__main__":
    unittest.main()
