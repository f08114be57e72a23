"""Our client against the real fwknopd: every type of message, every carrier, GPG."""

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
import unittest
from typing import Any, List

from tests.netns import CLIENT4, KEYS, SERVER4, SPA_CLIENT, STANZA, Cable, Process, start_fwknopd
from tests.support import TIMEOUT, TOP, SharedCase, needs_programs, needs_root, wait_for, write

CONFIG = """PCAP_INTF eth0;
PCAP_FILTER udp or tcp or icmp;
ENABLE_SPA_OVER_HTTP Y;
ENABLE_IPT_FORWARDING Y;
ENABLE_IPT_LOCAL_NAT Y;
"""
KNOCK = ["-a", CLIENT4, "-D", SERVER4]
GPG_HMAC = "gpg-hmac-%d"
PASSPHRASE = "gpg pass#phrase"


class DaemonCase(SharedCase):
    """Tests with one fwknopd for all of them; each asks for a port that no other asks for."""

    cable: Cable
    daemon: Process
    access = STANZA + "ENABLE_CMD_EXEC Y\n"

    @classmethod
    def prepare(cls, stack: contextlib.ExitStack) -> None:
        """Start it."""
        cls.cable = stack.enter_context(Cable())
        cls.daemon = start_fwknopd(cls.cable.server, cls.access, CONFIG)

    def knock(self, *words: str, keys: List[str] = KEYS) -> str:
        """Run our client, and return what it printed."""
        return self.cable.client.run(*SPA_CLIENT, *keys, *KNOCK, *words)

    def nat_rule(self, port: int) -> str:
        """Return the rule of the table nat for a port, once it is there."""
        pattern = re.compile(r"^-A FWKNOP_PREROUTING .*--dport %d .*$" % port, re.M)
        rules = wait_for(lambda: pattern.findall(self.cable.server.run(
            "iptables", "-t", "nat", "-S")), "a rule for port %d" % port)
        return str(rules[0])


@needs_root
@needs_programs("ip", "fwknopd", "iptables")
class TypesTest(DaemonCase):
    """Messages of type 0 to 6."""

    def test_access(self) -> None:
        """Types 1 and 3, several ports at once; the longest and the shortest time."""
        self.knock("-A", "tcp/1001,udp/1002")
        self.daemon.wait_for("for %s -> 0.0.0.0/0 tcp/1001,udp/1002," % CLIENT4)
        for port, seconds, given in ((1003, 1, 1), (1004, 65536, 300)):
            began = int(time.time())
            self.knock("-A", "tcp/%d" % port, "-f", str(seconds))
            line = self.daemon.wait_for("0.0.0.0/0 tcp/%d," % port)
            expires = int(line.rpartition(" ")[2])
            self.assertTrue(began + given <= expires <= time.time() + given, line)

    def test_command(self) -> None:
        """Type 0: fwknopd runs it, with -A and -f beside it as without."""
        for words in ([], ["-f", "60"], ["-A", "tcp/1"]):
            path = self.cable.server.path("touched")
            self.knock("-C", "touch " + path, *words)
            self.daemon.wait_for("command='touch %s'" % path)
            self.assertTrue(wait_for(functools.partial(os.path.exists, path), "the command"))

    def test_nat(self) -> None:
        """Types 2 and 4: fwknopd's rule leads to the host and port that were named."""
        for port, inside, words, target in (
                (1011, "192.168.10.55,8080", [], "192.168.10.55:8080"),
                (1012, "192.168.10.55:8081", ["-f", "77"], "192.168.10.55:8081"),
                (1013, "192.168.10.56", [], "192.168.10.56:1013")):
            with self.subTest(inside=inside):
                began = int(time.time())
                self.knock("-A", "tcp/%d" % port, "-N", inside, *words)
                rule = self.nat_rule(port)
                self.assertIn("-s %s/32" % CLIENT4, rule)
                self.assertTrue(rule.endswith("-j DNAT --to-destination " + target), rule)
                found = re.search(r"_exp_(\d+)", rule)
                assert found is not None
                seconds = 77 if words else 300
                self.assertTrue(began + seconds <= int(found.group(1)) <= time.time() + seconds)

    def test_nat_port(self) -> None:
        """--nat-port and --nat-rand-port: the port outside is another one, and it is told."""
        self.knock("-A", "tcp/1021", "-N", "192.168.10.57", "--nat-port", "1022")
        self.assertTrue(self.nat_rule(1022).endswith("192.168.10.57:1021"))
        text = self.knock("-A", "tcp/1023", "-N", "192.168.10.58", "--nat-rand-port")
        found = re.fullmatch(r"\[\+\] Randomly assigned port '(\d+)' on: '%s,tcp/(\d+)' will grant "
                             r"access to: '192\.168\.10\.58,1023'\n" % CLIENT4, text)
        assert found is not None, text
        self.assertEqual(found.group(1), found.group(2))
        self.assertGreaterEqual(int(found.group(1)), 10000)
        self.assertTrue(self.nat_rule(int(found.group(1))).endswith("192.168.10.58:1023"))

    def test_local_nat(self) -> None:
        """Types 5 and 6: to the server itself, and to another name of it."""
        for port, words, target in (
                (1031, [], SERVER4 + ":22"), (1032, ["-f", "50"], SERVER4 + ":22"),
                (1033, ["-N", "10.55.0.9"], "10.55.0.9:22")):
            self.knock("-A", "tcp/22", "--nat-local", "--nat-port", str(port), *words)
            rule = self.nat_rule(port)
            self.assertTrue(rule.endswith("-j DNAT --to-destination " + target), rule)


@needs_root
@needs_programs("ip", "fwknopd", "iptables")
class CarriersTest(DaemonCase):
    """UDP, TCP, HTTP, ICMP and the raw ones."""

    ports = iter(range(1101, 1200))

    def assert_opened(self, *words: str, source: str = CLIENT4) -> str:
        """fwknopd takes a packet that is sent with these options, from this address."""
        mark, port = self.daemon.mark(), next(self.ports)
        text = self.knock("-A", "tcp/%d" % port, *words)
        line = self.daemon.wait_for("0.0.0.0/0 tcp/%d," % port, mark)
        self.assertIn("Added access rule", line)
        self.daemon.wait_for("SPA Packet from IP: %s received" % source, mark)
        return text

    def test_streams(self) -> None:
        """TCP, and HTTP with an agent that fwknopd knows."""
        self.cable.server.listen(62201, 80)
        self.assertEqual("", self.assert_opened("-P", "tcp"))
        self.assertEqual("", self.assert_opened("-P", "http", "-p", "80"))
        self.assert_opened("-P", "http", "-u", "Fwknop/me")

    def counters(self, host: Any) -> Any:
        """The numbers of /proc/net/snmp, as (protocol, name)."""
        lines = host.run("cat", "/proc/net/snmp").splitlines()
        return {(head.split()[0], name): int(value) for head, values in zip(lines[::2], lines[1::2])
                for name, value in list(zip(head.split(), values.split()))[1:]}

    def test_raw(self) -> None:
        """UDP, TCP and ICMP with headers of our own, which the server's kernel finds right."""
        before = self.counters(self.cable.server)
        for words in (["udpraw"], ["tcpraw"], ["icmp"], ["icmp", "--icmp-type", "8"],
                      ["icmp", "--icmp-type", "3", "--icmp-code", "13"],
                      ["udpraw", "-S", "53", "-p", "9999"]):
            with self.subTest(words):
                self.assertEqual("", self.assert_opened("-P", *words))
        after = self.counters(self.cable.server)
        for name in (("Udp:", "InCsumErrors"), ("Tcp:", "InCsumErrors"), ("Icmp:", "InCsumErrors"),
                     ("Ip:", "InHdrErrors")):
            self.assertEqual(before[name], after[name], name)
        for name in (("Icmp:", "InEchoReps"), ("Icmp:", "InEchos"), ("Udp:", "NoPorts"),
                     ("Tcp:", "OutRsts"), ("Icmp:", "OutEchoReps")):
            self.assertGreater(after[name], before[name], name)

    def test_spoofed_source(self) -> None:
        """The packet comes from an address that the client does not have."""
        for carrier in ("udpraw", "tcpraw", "icmp"):
            self.assert_opened("-P", carrier, "-Q", "10.55.0.77", source="10.55.0.77")

    def test_random_port(self) -> None:
        """-r: a port that -v tells."""
        text = self.assert_opened("-r", "-v")
        found = re.search(r"^    destination port: (\d+)$", text, re.M)
        assert found is not None, text
        self.assertTrue(10000 <= int(found.group(1)) <= 65535)

    def test_no_right_to_raw(self) -> None:
        """Without root a raw carrier fails with a hint, and nothing is sent."""
        code, text = self.cable.client.run_code(
            "setpriv", "--reuid", "65534", "--clear-groups", "--bounding-set=-all", *SPA_CLIENT,
            *KEYS, *KNOCK, "-A", "tcp/9", "-P", "udpraw")
        self.assertEqual((1, "spa_client.py: %s: Operation not permitted (it needs root)\n"
                          % SERVER4), (code, text))

    def test_refused(self) -> None:
        """A port without a listener: no packet, and it is said."""
        code, text = self.cable.client.run_code(
            *SPA_CLIENT, *KEYS, *KNOCK, "-A", "tcp/9", "-P", "tcp", "-p", "4")
        self.assertEqual((1, "spa_client.py: %s: Connection refused\n" % SERVER4), (code, text))


def run_gpg(home: str, *words: str, text: str = "") -> str:
    """Run gpg with a key ring of its own, and return what it prints."""
    return subprocess.run(
        ["gpg", "--homedir", home, "--batch", "--no-tty", *words], input=text.encode(), check=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=TIMEOUT).stdout.decode()


class Rings:
    """Key rings of a server and a client in new directories, from the keys of the vectors."""

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp(prefix="spag")  # short: a socket's path is
        self.server, self.client = (os.path.join(self.directory, name) for name in "sc")
        with open(os.path.join(TOP, "tests", "vectors", "fwknop.json")) as file:
            keys = json.load(file)["gpg_test_keys"]
        for home in (self.server, self.client):
            os.mkdir(home, 0o700)
        run_gpg(self.server, "--import", text=keys["recipient_secret_armored"])
        run_gpg(self.client, "--import", text=keys["signer_secret_armored"])
        for kind in ("rsa2048", "ed25519"):
            run_gpg(self.client, "--pinentry-mode", "loopback", "--passphrase", PASSPHRASE,
                    "--quick-generate-key", "%s@fko.test" % kind, kind, "sign", "never")
        run_gpg(self.server, "--pinentry-mode", "loopback", "--passphrase", "",
                "--quick-generate-key", "curve@fko.test", "future-default", "default", "never")
        for one, other in ((self.server, self.client), (self.client, self.server)):
            run_gpg(one, "--import", text=run_gpg(other, "--armor", "--export"))
        for name in ("client@fko.test", "rsa2048@fko.test"):
            run_gpg(self.server, "--import-ownertrust", text=self.fingerprint(name) + ":6:\n")

    def fingerprint(self, name: str) -> str:
        """The fingerprint of a client's key."""
        return run_gpg(self.client, "--with-colons", "--list-keys", name).partition(
            "\nfpr:")[2].split(":")[8]

    def forget(self) -> None:
        """Let gpg-agent forget passphrases."""
        for home in (self.server, self.client):
            subprocess.call(["gpgconf", "--homedir", home, "--kill", "gpg-agent"])

    def close(self) -> None:
        """End what gpg started, and delete the rings."""
        self.forget()
        shutil.rmtree(self.directory, True)


@needs_root
@needs_programs("ip", "fwknopd", "iptables", "gpg")
class GpgTest(DaemonCase):
    """Packets that gpg encrypted, signed and unsigned, with and without passphrase."""

    rings: Rings

    @classmethod
    def prepare(cls, stack: contextlib.ExitStack) -> None:
        """Make key rings, and a stanza for each kind of packet; their HMAC keys tell them apart."""
        cls.rings = Rings()
        stack.callback(cls.rings.close)
        cls.access = ""
        for number, policy in enumerate((
                "GPG_DISABLE_SIG Y", "GPG_REMOTE_ID " + cls.rings.fingerprint("client@")[-8:],
                "GPG_FINGERPRINT_ID " + cls.rings.fingerprint("rsa2048@"))):
            cls.access += ("SOURCE ANY\nGPG_HOME_DIR %s\nGPG_DECRYPT_ID server@fko.test\n"
                           "GPG_ALLOW_NO_PW Y\nHMAC_KEY %s\n%s\n"
                           % (cls.rings.server, GPG_HMAC % number, policy))
        super().prepare(stack)

    def gpg(self, number: int, *words: str) -> List[str]:
        """The options for a packet to the stanza of this number."""
        return ["-g", "--gpg-recipient-key", "server@fko.test", "--gpg-home-dir",
                self.rings.client, "--key-hmac", GPG_HMAC % number, *words]

    def test_unsigned(self) -> None:
        """No passphrase is asked for; other types of message and digests as well."""
        self.knock("-A", "tcp/1201", keys=self.gpg(0))
        self.daemon.wait_for("0.0.0.0/0 tcp/1201,")
        self.knock("-A", "tcp/1202", "-N", "192.168.10.59,80", "-f", "50", "-m", "sha512",
                   keys=self.gpg(0))
        self.assertTrue(self.nat_rule(1202).endswith("192.168.10.59:80"))

    def test_signed(self) -> None:
        """By a key without passphrase (--gpg-no-signing-pw)."""
        self.knock("-A", "tcp/1203", keys=self.gpg(
            1, "--gpg-signer-key", "client@fko.test", "--gpg-no-signing-pw"))
        self.daemon.wait_for("0.0.0.0/0 tcp/1203,")

    def test_passphrase(self) -> None:
        """From a file; gpg gets it by a file descriptor, no list of arguments ever has it."""
        log = self.cable.client.path("argv")
        rc = write(os.path.join(self.rings.directory, "rc"),
                   "[default]\nGPG_SIGNING_PW_BASE64 Z3BnIHBhc3MjcGhyYXNl\n")
        shim = write(self.cable.client.path("gpg"), '#!/bin/sh\nprintf "%%s\\n" "$@" >>%s; '
                     'env >>%s; exec gpg "$@"\n' % (log, log), 0o700)
        self.rings.forget()
        words = self.gpg(2, "--gpg-signer-key", "rsa2048@fko.test", "--gpg-exe", shim)
        self.cable.client.run(*SPA_CLIENT[:-1], "--rc-file", rc, *words, *KNOCK, "-A", "tcp/1204")
        self.daemon.wait_for("0.0.0.0/0 tcp/1204,")
        with open(log) as stream:
            said = stream.read()
        self.assertIn("--passphrase-fd", said)
        self.assertNotIn(PASSPHRASE, said)

    def test_passphrase_from_standard_input(self) -> None:
        """One line of it; a wrong one sends nothing."""
        self.rings.forget()
        words = [*SPA_CLIENT, *self.gpg(2, "--gpg-signer-key", "rsa2048@fko.test", "--stdin"),
                 *KNOCK, "-A", "tcp/1205"]
        code, text = self.cable.client.run_code(*words, input="wrong\n")
        self.assertEqual(1, code)
        self.assertIn("Bad passphrase", text)
        self.assertNotIn("0.0.0.0/0 tcp/1205,", self.daemon.output())
        self.cable.client.run(*words, input=PASSPHRASE + "\n")
        self.daemon.wait_for("0.0.0.0/0 tcp/1205,")

    def test_wrong_names(self) -> None:
        """Keys and programs that are not there, in gpg's words; nothing is sent."""
        for words, expected in (
                (["--gpg-recipient-key", "nobody"], "No public key"),
                (["--gpg-signer-key", "nobody", "--gpg-no-signing-pw"], "No secret key"),
                (["--gpg-exe", "/nonexistent"], "/nonexistent: No such file or directory"),
                (["--gpg-home-dir", "/nonexistent"], "No public key")):
            with self.subTest(words):
                code, text = self.cable.client.run_code(
                    *SPA_CLIENT, *self.gpg(0), *KNOCK, "-A", "tcp/1206", *words)
                self.assertEqual(1, code)
                self.assertTrue(text.startswith("spa_client.py: "), text)
                self.assertEqual(1, text.count("\n"), text)
                self.assertIn(expected, text)
        self.assertNotIn("tcp/1206", self.daemon.output())

    def test_curve25519(self) -> None:
        """Such a packet does not begin with hQ, and loses nothing; its text can be decrypted."""
        text = self.knock("-A", "tcp/1207", "-T", keys=self.gpg(
            0, "--gpg-recipient-key", "curve@fko.test"))
        shown = dict(line.strip().split(": ", 1) for line in text.splitlines() if ": " in line)
        packet = shown["Final SPA Data"][:-len(shown["HMAC"])]
        self.assertTrue(packet.startswith("hF4D"), packet)
        path = self.cable.client.path("message")
        with open(path, "wb") as file:
            file.write(subprocess.run(["base64", "-d"], input=(packet + "==="[
                :-len(packet) % 4]).encode(), stdout=subprocess.PIPE, check=True).stdout)
        self.assertEqual(shown["Encoded Data"] + ":" + shown["SPA Data Digest"],
                         run_gpg(self.rings.server, "-d", path))

    def test_too_long(self) -> None:
        """More than 1500 characters, and a command of more than 192, are errors that say so."""
        code, text = self.cable.client.run_code(
            *SPA_CLIENT, *self.gpg(0, "--hmac-digest-type", "sha512"), *KNOCK, "-C", "x" * 190)
        self.assertEqual(1, code)
        self.assertIn("understand at most 192", text)
        run_gpg(self.rings.client, "--pinentry-mode", "loopback", "--passphrase", "",
                "--quick-generate-key", "big@fko.test", "rsa4096", "sign,encr", "never")
        big = ["--gpg-recipient-key", "big@fko.test", "--gpg-signer-key", "big@fko.test",
               "--gpg-no-signing-pw"]
        code, text = self.cable.client.run_code(
            *SPA_CLIENT, *self.gpg(0, *big), *KNOCK, "-A", "tcp/1208")
        self.assertEqual(1, code)
        self.assertRegex(text, "the packet would be 1[67][0-9][0-9] characters long, and servers "
                               "look at most at 1500 ")


if __name__ == "__main__":
    unittest.main()
