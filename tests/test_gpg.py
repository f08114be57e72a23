"""GPG packets: directives, gpg's answers good and evil, lengths and beginnings, and bounds.

What needs no gpg runs against a script that answers as gpg does; the rest against the real one,
with the packets of the real client in vectors/ and packets that gpg makes here.
"""

import base64
import contextlib
import functools
import hmac
import os
import sys
import time
import unittest
from typing import Any, Dict, List, Tuple
from unittest import mock

import spa_server as server
from tests.gnupg import Keyring
from tests.support import SharedCase, needs_programs, read, write
from tests.test_config import ConfigCase
from tests.test_packet import Sender, b64, is_authentic, read_vectors
from tests.test_server import DOOR22, KEYS, ServerCase, datagram

SIGNER = "0184985F04B9501DEEA2118A70D8780D786C8A06"
SUBKEY = "1111111111111111111111112222222233333333"
DECRYPT = "CDD7369A9715A944160DC0E0F2CFDBB1A8BC16BA"
DECRYPT_SUBKEY = "14BD112B9D416DBC3B092628FA0789F8E8F44FA4"
VECTOR_TIME = 1795370185
GPG_STANZA = "SOURCE ANY\nGPG_DECRYPT_ID %s\nGPG_ALLOW_NO_PW Y\n" % DECRYPT
SIGNED = GPG_STANZA + "GPG_FINGERPRINT_ID %s\n" % SIGNER
HMAC = "HMAC_KEY hmacKey-for-tests\n"

# What gpg 2.2 says of a message that is encrypted and signed as it should be.
GOOD = """
ENC_TO FA0789F8E8F44FA4 1 0
KEY_CONSIDERED %(primary)s 0
DECRYPTION_KEY %(decrypt)s %(primary)s u
BEGIN_DECRYPTION
DECRYPTION_INFO 2 9 0
PLAINTEXT 62 1795370185 name
PLAINTEXT_LENGTH 117
NEWSIG
SIG_ID x6PtSHelToga/tJSmioeDHk0VFM 2026-11-22 1795370185
GOODSIG 70D8780D786C8A06 client <client@fko.test>
VALIDSIG %(signer)s 2026-11-22 1795370185 0 4 0 1 10 00 %(signer)s
TRUST_FULLY 0 pgp
DECRYPTION_OKAY
GOODMDC
END_DECRYPTION
""" % {"primary": DECRYPT, "decrypt": DECRYPT_SUBKEY, "signer": SIGNER}


def status(text: str) -> bytes:
    """Return status lines as gpg writes them."""
    return "".join("[GNUPG:] %s\n" % line for line in text.strip().splitlines()).encode()


def strip(message: bytes) -> bytes:
    """Return an OpenPGP message as a sender puts it on the wire, without its tag."""
    text = b64(message)
    return text[2:] if text.startswith(b"hQ") else text


# ------------------------------------------------------------------- directives

class GpgDirectiveTest(ConfigCase):
    """What access.conf may say of GPG, and what the stanza becomes."""

    def test_stanzas_that_are_not_enough(self) -> None:
        """Without a passphrase, without a signer, without the key: at the line it is about."""
        decrypt = "SOURCE ANY\nGPG_DECRYPT_ID ABCD1234\n"
        for text, expected in (
                (decrypt + "GPG_REMOTE_ID ABCD1234\n",
                 "access.conf:2: GPG_DECRYPT_ID: expected GPG_DECRYPT_PW as well, or GPG_ALLOW_"),
                (decrypt + "GPG_ALLOW_NO_PW N\nGPG_REMOTE_ID ABCD1234\nKEY k\n",
                 "access.conf:2: GPG_DECRYPT_ID: expected GPG_DECRYPT_PW as well, or GPG_ALLOW_"),
                (decrypt + "GPG_ALLOW_NO_PW Y\n",
                 "access.conf:2: GPG_DECRYPT_ID: expected GPG_REMOTE_ID or GPG_FINGERPRINT_ID"),
                (decrypt + "GPG_DECRYPT_PW x\nGPG_REQUIRE_SIG N\nGPG_DISABLE_SIG N\nKEY k\n",
                 "access.conf:2: GPG_DECRYPT_ID: expected GPG_REMOTE_ID or GPG_FINGERPRINT_ID"),
                ("SOURCE ANY\nENCRYPTION_MODE Asymmetric\nKEY k\n",
                 "access.conf:2: ENCRYPTION_MODE: expected GPG_DECRYPT_ID"),
                ("SOURCE ANY\nGPG_REMOTE_ID ABCD1234\nGPG_DISABLE_SIG Y\n",
                 "access.conf:1: SOURCE: expected a KEY or KEY_BASE64 in this stanza, or GPG_D")):
            with self.subTest(text=text):
                self.assertTrue(self.error_of(text).startswith(expected), self.error_of(text))

    def test_stanzas_that_are_enough(self) -> None:
        """GPG alone, beside KEY, with each of the two ways to name signers, and with none."""
        for lines, symmetric in (
                ("GPG_ALLOW_NO_PW Y\nGPG_REMOTE_ID abcd1234, 1234ABCD5678abcd\n", False),
                ("GPG_DECRYPT_PW p w \nGPG_FINGERPRINT_ID %s\nKEY k\n" % SIGNER, True),
                ("GPG_ALLOW_NO_PW Y\nGPG_DISABLE_SIG Y\nENCRYPTION_MODE asymmetric\n", False),
                ("GPG_ALLOW_NO_PW Y\nGPG_DISABLE_SIG Y\nENCRYPTION_MODE Asymmetric\nKEY k\n",
                 False)):
            with self.subTest(lines=lines):
                stanza = self.stanzas("SOURCE ANY\nGPG_DECRYPT_ID bob@x\n" + lines)[0]
                self.assertEqual(symmetric, stanza.keys is not None)
        stanza = self.stanzas("SOURCE ANY\nGPG_DECRYPT_ID x\nGPG_DECRYPT_PW p w ;\nGPG_REMOTE_ID "
                              "abcd1234, 1234 ABCD 5678 abcd\nGPG_FINGERPRINT_ID 0184 985f 04B9 "
                              "501D EEA2  118A 70D8 780D 786C 8A06 ,%s\n" % SUBKEY)[0]
        self.assertEqual(b"p w ", bytes(stanza.gpg_passphrase))
        self.assertEqual({"ABCD1234", "1234ABCD5678ABCD"}, stanza.gpg_remote_ids)
        self.assertEqual({SIGNER, SUBKEY}, stanza.gpg_fingerprints)

    def test_warnings(self) -> None:
        """No HMAC, no signature, both; and settings that have no effect."""
        def warned(lines: str) -> str:
            path = self.write("access.conf", GPG_STANZA + lines)
            return "\n".join(server.read_stanzas(path)[1])

        self.assertIn("anybody can make this server start gpg", warned("GPG_REMOTE_ID ABCD1234\n"))
        self.assertNotIn("start gpg", warned("GPG_REMOTE_ID ABCD1234\n" + HMAC))
        self.assertIn("only the HMAC tells", warned("GPG_DISABLE_SIG Y\n" + HMAC))
        self.assertIn("everybody who has the public key", warned("GPG_DISABLE_SIG Y\n"))
        self.assertIn("GPG_REQUIRE_SIG N has no effect",
                      warned("GPG_REMOTE_ID ABCD1234\nGPG_REQUIRE_SIG N\n"))
        self.assertIn("the KEY of this stanza opens nothing",
                      warned("GPG_DISABLE_SIG Y\nENCRYPTION_MODE Asymmetric\nKEY k\n"))

    def test_the_dump_hides_the_passphrase(self) -> None:
        """-D shows every other row, and needs no gpg."""
        code, out, err = self.main_with(SIGNED + "GPG_DECRYPT_PW s3cretMARKER\nGPG_HOME_DIR /x\n",
                                        "PCAP_INTF lo;\n", "-D")
        self.assertEqual(0, code, err)
        self.assertNotIn("s3cretMARKER", out + err)
        for line in ("GPG_DECRYPT_PW:  <see the access.conf file>", "GPG_HOME_DIR:  /x",
                     "GPG_DECRYPT_ID:  " + DECRYPT, "GPG_FINGERPRINT_ID:  " + SIGNER):
            self.assertRegex(out, "(?m)^ +%s$" % line)

    def test_options(self) -> None:
        """fwknopd's two, which go before the file's."""
        settings = self.settings_of("-c", self.write("fwknopd.conf", "GPG_HOME_DIR /a;\n"),
                                    "--gpg-home-dir", "/b", "--gpg-exe", "/c")
        self.assertEqual(("/b", "/c"), (settings.gpg_home, settings.gpg_program))
        plain = server.ServerSettings()
        plain.set_defaults()
        self.assertEqual(os.path.expanduser("~/.gnupg"), plain.gpg_home)


# ------------------------------------------------------------------- what gpg says

class StatusTest(ConfigCase):
    """gpg's status lines: what is taken for good, and everything else."""

    def verdict(self, text: str, lines: str = "GPG_FINGERPRINT_ID %s\n" % SIGNER) -> str:
        """Return the signer, "unasked", or the log line of the rejection."""
        stanza = self.stanzas(GPG_STANZA + lines)[0]
        answer = server.GpgAnswer(b"x", server.parse_gpg_status(status(text)), True)
        try:
            server.check_decrypted(answer, frozenset([DECRYPT, DECRYPT_SUBKEY]))
            if stanza.gpg_disable_sig:
                return "unasked"
            return str(server.check_signature(answer, stanza))
        except server.PacketRejected as rejection:
            return str(rejection)

    def changed(self, old: str, new: str) -> str:
        """Return the good lines with one change."""
        self.assertIn(old, GOOD)
        return GOOD.replace(old, new)

    def test_good(self) -> None:
        """As it should be, with each degree of trust that fwknop takes, and among other lines."""
        self.assertEqual(SIGNER, self.verdict(GOOD))
        for trust in ("TRUST_MARGINAL", "TRUST_ULTIMATE", "TRUST_FULLY 0 pgp\nTRUST_FULLY"):
            self.assertEqual(SIGNER, self.verdict(self.changed("TRUST_FULLY", trust)))
        self.assertEqual(SIGNER, self.verdict("PROGRESS x\n" + GOOD + "NO_SUCH_LINE 1 2 3\n\n"))
        other = self.changed("ENC_TO FA", "ENC_TO 1122334455667788 1 0\nNO_SECKEY 1122334455667788"
                             "\nENC_TO FA")
        self.assertEqual(SIGNER, self.verdict(other))  # encrypted to the sender as well

    def test_decryption(self) -> None:
        """Everything that is not one text, whole, by the right key, is no decryption."""
        key_line = "DECRYPTION_KEY %s %s u\n" % (DECRYPT_SUBKEY, DECRYPT)
        for text, problem in (
                ("", "the key can't be used"), ("NODATA 1\nNODATA 2\n", "No data"),
                ("ENC_TO 1122334455667788 1 0\nNO_SECKEY 1122334455667788\n", "No secret key"),
                (self.changed(key_line, ""), "the key can't be used"),
                (self.changed(key_line, "DECRYPTION_KEY\n"), "the key can't be used"),
                (self.changed(key_line, "DECRYPTION_KEY %s %s u\n" % (SUBKEY, DECRYPT)),
                 "a key that is not GPG_DECRYPT_ID"),
                (self.changed(key_line, key_line + "DECRYPTION_KEY %s %s u\n" % (SUBKEY, SUBKEY)),
                 "a key that is not GPG_DECRYPT_ID"),
                (self.changed("GOODMDC\n", ""), "Bad data"),
                (self.changed("GOODMDC\n", "BADMDC\n"), "Bad data"),
                (GOOD + "BADMDC\n", "Bad data"),
                (self.changed("DECRYPTION_OKAY", "DECRYPTION_FAILED"), "Bad data"),
                (GOOD + "DECRYPTION_FAILED\n", "Bad data"),
                (GOOD + "ERROR proc_pkt.plaintext 89_BAD_DATA\n", "Bad data"),
                (self.changed("PLAINTEXT 62", "NOTHING 62"), "expected one text"),
                (self.changed("PLAINTEXT 62", "PLAINTEXT 62 1 a\n[GNUPG:] PLAINTEXT 62"),
                 "expected one text")):
            with self.subTest(text=text[:200], problem=problem):
                text = text.replace("[GNUPG:] ", "")
                said = self.verdict(text)
                self.assertTrue(said.startswith("Error creating fko context: Decryption operation "
                                                "failed - GPG ERROR: "), said)
                self.assertIn(problem, said)

    def test_signatures(self) -> None:
        """None, more than one, bad, expired, revoked, unknown, not trusted, of something else."""
        signature = GOOD[GOOD.index("NEWSIG"):GOOD.index("DECRYPTION_OKAY")]
        bad = "Error creating fko context: Bad GPG signature - GPG ERROR: "
        for text, expected in (
                (GOOD.replace(signature, ""), "Error creating fko context: Missing GPG signature"),
                (self.changed("GOODSIG", "BADSIG"), bad + "BADSIG"),
                (self.changed("GOODSIG", "EXPSIG"), bad + "EXPSIG"),
                (self.changed("GOODSIG", "EXPKEYSIG"), bad + "EXPKEYSIG"),
                (self.changed("GOODSIG", "REVKEYSIG"), bad + "REVKEYSIG"),
                (GOOD.replace(signature, "NEWSIG\nERRSIG 70D8780D786C8A06 1 10 00 1795370185 9 %s\n"
                              "NO_PUBKEY 70D8780D786C8A06\n" % SIGNER), bad + "ERRSIG"),
                (GOOD.replace(signature, "NEWSIG\n"), bad + "expected one signature"),
                (GOOD.replace(signature, signature * 2), bad + "expected one signature"),
                (GOOD.replace(signature, signature + "NEWSIG\nBADSIG 1 x\n"), bad + "expected one"),
                (GOOD.replace(signature, "NEWSIG\nERRSIG 1\n" + signature), bad + "expected one"),
                (self.changed("VALIDSIG", "INVALIDSIG"), bad + "expected the signature"),
                (self.changed(" 10 00 ", " 10 10 "), bad + "expected the signature"),  # of a key
                (self.changed(" 1 10 00 " + SIGNER, ""), bad + "expected the signature"),
                (self.changed("TRUST_FULLY", "TRUST_UNDEFINED"), bad + "TRUST_UNDEFINED"),
                (self.changed("TRUST_FULLY", "TRUST_NEVER"), bad + "TRUST_NEVER"),
                (self.changed("TRUST_FULLY 0 pgp\n", ""), bad + "TRUST_UNDEFINED"),
                (GOOD + "TRUST_UNDEFINED\n", bad + "TRUST_FULLY TRUST_UNDEFINED")):
            with self.subTest(expected=expected, text=text):
                said = self.verdict(text)
                self.assertTrue(said.startswith(expected), said)
                self.assertEqual("unasked", self.verdict(text, "GPG_DISABLE_SIG Y\n"))

    def test_ignored_errors(self) -> None:
        """GPG_IGNORE_SIG_VERIFY_ERROR lets pass who is not trusted or expired; nothing forged."""
        lines = "GPG_REMOTE_ID %s\nGPG_IGNORE_SIG_VERIFY_ERROR Y\n" % SIGNER
        for new in ("TRUST_UNDEFINED", "TRUST_NEVER", "NO_TRUST_LINE"):
            self.assertEqual(SIGNER, self.verdict(self.changed("TRUST_FULLY", new), lines))
        for new in ("EXPSIG", "EXPKEYSIG"):
            self.assertEqual(SIGNER, self.verdict(self.changed("GOODSIG", new), lines))
        for new in ("BADSIG", "ERRSIG", "REVKEYSIG", "NO_SIG"):
            with self.subTest(new=new):
                self.assertIn("Bad GPG signature", self.verdict(self.changed("GOODSIG", new),
                                                                lines))
        self.assertIn("not in the GPG_REMOTE_ID list",
                      self.verdict(GOOD, lines.replace(SIGNER, SUBKEY)))

    def test_signers(self) -> None:
        """Ids of three lengths in either case, of the key that signed or the one it belongs to."""
        with_subkey = self.changed("VALIDSIG " + SIGNER, "VALIDSIG " + SUBKEY)
        for lines, text, good in (
                ("GPG_REMOTE_ID 786C8A06", GOOD, True), ("GPG_REMOTE_ID 786c8a06", GOOD, True),
                ("GPG_REMOTE_ID 70d8780D786C8A06", GOOD, True),
                ("GPG_REMOTE_ID " + SIGNER.lower(), GOOD, True),
                ("GPG_REMOTE_ID 00000000,786C8A06", GOOD, True),
                ("GPG_REMOTE_ID 786C8A07", GOOD, False), ("GPG_REMOTE_ID 0184985F", GOOD, False),
                ("GPG_REMOTE_ID 60D8780D786C8A06", GOOD, False),
                ("GPG_REMOTE_ID 786C8A06", with_subkey, True),
                ("GPG_REMOTE_ID 33333333", with_subkey, True),
                ("GPG_REMOTE_ID 33333333", GOOD, False),
                ("GPG_FINGERPRINT_ID " + SIGNER, GOOD, True),
                ("GPG_FINGERPRINT_ID " + SIGNER.lower(), with_subkey, True),
                ("GPG_FINGERPRINT_ID " + SUBKEY, with_subkey, True),
                ("GPG_FINGERPRINT_ID " + SUBKEY, GOOD, False),
                ("GPG_FINGERPRINT_ID %s\nGPG_REMOTE_ID 786C8A06" % SIGNER, GOOD, True),
                ("GPG_FINGERPRINT_ID %s\nGPG_REMOTE_ID 786C8A07" % SIGNER, GOOD, False),
                ("GPG_FINGERPRINT_ID %s\nGPG_REMOTE_ID 786C8A06" % SUBKEY, GOOD, False)):
            with self.subTest(lines=lines, good=good):
                said = self.verdict(text, lines + "\n")
                self.assertEqual(good, len(said) == 40, said)
                if not good:
                    self.assertRegex(said, r"^Incoming SPA packet signed by(| ID): [0-9A-F]+, but "
                                           r"that (ID|fingerprint) is not in the GPG_\w+ list\.$")

    def test_lines_that_are_not_gpgs(self) -> None:
        """Only whole lines that begin as gpg's count: a name in a message can't add one."""
        for text in (b" [GNUPG:] GOODMDC\n", b"gpg: [GNUPG:] GOODMDC\n", b"[GNUPG:]GOODMDC\n",
                     b"[GNUPG:]\n", b"\n\xff\0\n", b"[GNUPG:] PLAINTEXT 62 1 [GNUPG:] GOODMDC\n",
                     b"[GNUPG:] PLAINTEXT 62 1 x%0A[GNUPG:] GOODMDC\n"):
            self.assertNotIn("GOODMDC", server.parse_gpg_status(text))


# ------------------------------------------------------------------- beginnings and lengths

def packet_head(length: int) -> bytes:
    """Return the head of an old-format session key packet, its length as short as gpg's."""
    if length < 256:
        return bytes([0x84, length, 3])
    return bytes([0x85]) + length.to_bytes(2, "big") + b"\3"


class PrefixTest(unittest.TestCase):
    """Which two characters the sender left off, told from what is there."""

    def test_every_length_that_fits(self) -> None:
        """Stripped or whole, old format or new: no packet can be taken for another."""
        for length in range(20, 1125):
            whole = b64(packet_head(length) + b"\xfa\x07\x89\xf8\xe8")
            self.assertEqual(length >= 256, whole.startswith(b"hQ"))
            sent = whole[2:] if whole.startswith(b"hQ") else whole
            sent = sent.ljust(400, b"A")
            self.assertTrue((server.find_prefix(sent) + sent).startswith(whole), length)
        for head in (b"\xc1\x5e\x03", b"\xc1\xc0\x4c\x03", b"\xc1\xff\0\0\1\x0c\x03"):
            whole = b64(head + b"\xfa\x07\x89\xf8")
            self.assertEqual(b"", server.find_prefix(whole))

    def test_kinds(self) -> None:
        """From 400 characters on, and shorter ones that begin as only OpenPGP does."""
        for payload, gpg in ((b"A" * 399, False), (b"A" * 400, True), (b"hF4D" + b"A" * 200, True),
                             (b"wV4D" + b"A" * 200, True), (b"8" + b"A" * 398, False),
                             (b"9" + b"A" * 399, True)):
            self.assertEqual(gpg, server.is_gpg(payload))
        for _ in range(200):
            self.assertFalse(server.is_gpg(Sender(salt=os.urandom(8)).packet()))


# ------------------------------------------------------------------- bounds

FAKE_GPG = """#!%s -IS
import os, sys, time
here = os.path.dirname(sys.argv[0])
words = sys.argv[1:]
if "--list-secret-keys" in words:
    print("sec:-:2048:1:F2CFDBB1A8BC16BA:1795366747:::-:::scESC:::+:::23::0:")
    print("fpr:::::::::%s:")
    print("ssb:-:2048:1:FA0789F8E8F44FA4:1795366763::::::e:::+:::23:")
    print("fpr:::::::::%s:")
    sys.exit()
message = sys.stdin.buffer.read()
with open(os.path.join(here, "runs"), "a") as file:
    print(words, sorted(os.environ), file=file)
with os.fdopen(int(words[words.index("--passphrase-fd") + 1]), "rb") as file:
    passphrase = file.read()
with open(os.path.join(here, "status")) as file:
    status = file.read()
exec(open(os.path.join(here, "code")).read())
os.write(int(words[words.index("--status-fd") + 1]), status.encode())
sys.stdout.buffer.write(message[message.index(b"TEXT") + 4:])
"""


def wait_for_gpg(made: Any) -> Any:
    """Let a server's receive() wait for gpg, as if its loop went on; return the server."""
    receive = made.gate.receive

    def receive_and_wait(each: Any, *run: Any) -> None:
        """Take a datagram, and go on until no gpg runs."""
        receive(each, *run)
        while made.gate.runs and not run:
            made.gate.go_on_with_gpg()
            time.sleep(0.001)

    made.gate.receive = receive_and_wait
    return made


def unlock(payload: bytes, keys: Any) -> Any:
    """Return what the server's function makes of a packet, after gpg."""
    while True:
        try:
            return server.unlock(payload, keys)
        except server.GpgNeeded as needed:
            needed.run.start()
            while not needed.run.has_ended():
                time.sleep(0.001)


class FakeGpgCase(ServerCase):
    """A server whose gpg is a script that finds the text at the end of a message."""

    def setUp(self) -> None:
        """Write the script."""
        super().setUp()
        text = FAKE_GPG % (os.path.realpath(sys.executable), DECRYPT, DECRYPT_SUBKEY)
        self.program = write(self.place("gpg"), text, 0o700)
        self.answer(GOOD)

    def answer(self, text: str, code: str = "") -> None:
        """Let the script answer so, and do this before."""
        for name, content in (("status", status(text).decode()), ("code", code)):
            with open(os.path.join(self.directory, name), "w") as file:
                file.write(content)

    def runs(self) -> List[str]:
        """Return what the script was started with, a line for each run."""
        return read(self.place("runs")).splitlines()

    def gpg_server(self, access: str = SIGNED) -> Any:
        """Return a server with its GPG stanzas ready."""
        made = self.serve(access, "GPG_EXE %s;\nGPG_HOME_DIR %s;\n" % (self.program,
                                                                      self.directory))
        server.load_gpg(made.settings, made.gate.stanzas, self.clocks)
        made.gate.configure(made.configuration)
        return wait_for_gpg(made)

    def message(self, number: int, text: str = "10.55.0.2,tcp/22", key_id: bytes = b"") -> bytes:
        """Return what stands for an OpenPGP message with a knock of now inside."""
        fields = [b"%016d" % number, b64(b"bob"), b"%d" % int(self.clock.wall_time), b"3.0.0",
                  b"1", b64(text.encode())]
        key_id = key_id or bytes.fromhex(DECRYPT_SUBKEY[-16:])
        return (b"\x85\x01\x0c\x03" + key_id + b"\1\x08\0" + bytes(268) + b"TEXT"
                + Sender().plain(b":".join(fields)))

    def packet(self, number: int, hmac_key: bytes = b"", **more: Any) -> bytes:
        """Return such a message as a packet."""
        body = strip(self.message(number, **more))
        return body + (b64(hmac.new(hmac_key, b"hQ" + body, "sha256").digest()) if hmac_key
                       else b"")


class BoundsTest(FakeGpgCase):
    """gpg costs a process: when it is started, how often, how long, and what it is told."""

    def test_a_knock_opens(self) -> None:
        """And the log says who signed."""
        made = self.gpg_server()
        made.gate.receive(datagram(self.packet(1)))
        self.assertEqual([DOOR22], self.firewall.doors())
        self.assertIn("[10.55.0.2] (stanza #1) Incoming SPA data signed by '786C8A06' "
                      "(fingerprint '%s').\n" % SIGNER, self.logged())

    def test_a_replay_has_no_line_of_its_signer(self) -> None:
        """Whoever sends a captured packet again and again does not fill the log with it."""
        made = self.gpg_server()
        message = self.message(1)
        for number in range(4):  # other spellings, which gpg has to read
            made.gate.receive(datagram(strip(message[:50] + bytes([number]) + message[51:])))
        self.assertEqual({"accepted": 1, "replay": 3}, made.tally.counts)
        self.assertEqual(1, self.logged().count("Incoming SPA data signed by"))
        self.clock.pass_seconds(-500)
        stale = self.packet(2)
        self.clock.pass_seconds(500)
        made.gate.receive(datagram(stale))
        self.assertEqual(1, made.tally.counts["stale"])
        self.assertNotIn("signed by", self.logged())

    def test_the_passphrase_goes_through_a_pipe(self) -> None:
        """Not among the words or in the environment, and gpg.conf and HOME are not asked."""
        self.answer(GOOD, "assert passphrase == b's3cret #1 \\n'")
        made = self.gpg_server(SIGNED + "GPG_DECRYPT_PW s3cret #1 \n")
        made.gate.receive(datagram(self.packet(1)))
        self.assertEqual([DOOR22], self.firewall.doors())
        (run,) = self.runs()
        self.assertNotIn("s3cret", run)
        self.assertNotIn("ignore-mdc", run)
        for word in ("'--no-options'", "'--batch'", "'loopback'", "'%s'" % self.directory):
            self.assertIn(word, run)
        self.assertNotIn("HOME", run.replace("--homedir", ""))

    def test_a_flood_without_hmac(self) -> None:
        """A burst, then one a second; what is over that is rejected, counted, and not started."""
        made = self.gpg_server()
        self.answer("NODATA 1\n")
        for number in range(30):
            made.gate.receive(datagram(self.packet(number)))
        self.assertEqual(server.GPG_BURST, len(self.runs()))
        self.assertEqual(30 - server.GPG_BURST, made.tally.counts["gpg too fast"])
        self.assertIn("GPG packets without HMAC come too fast", self.logged())
        self.clock.pass_seconds(3.01)
        for number in range(30, 60):
            made.gate.receive(datagram(self.packet(number)))
        self.assertEqual(server.GPG_BURST + 3, len(self.runs()))
        self.clock.pass_seconds(1000)
        self.answer(GOOD)
        made.gate.receive(datagram(self.packet(60)))
        self.assertEqual([DOOR22], self.firewall.doors())

    def test_slow_packets_without_hmac(self) -> None:
        """What takes gpg long takes its share: junk gets a tenth of the time, not all of it."""
        made = self.gpg_server()

        def slow(run: Any) -> None:
            run.began = self.clock.mono_time
            self.clock.pass_seconds(5)
            run.answer(server.PacketRejected("gpg failed", "gpg took more than 5 seconds"))

        start = self.clock.mono_time
        with mock.patch.object(server.GpgRun, "start", slow):
            for number in range(2000):
                made.gate.receive(datagram(self.packet(number)))
                self.clock.pass_seconds(0.5)
        self.assertLess(5 * made.tally.counts["gpg failed"], 0.15 * (self.clock.mono_time - start))
        self.assertGreater(made.tally.counts["gpg failed"], 10)

    def test_the_limit_is_one_for_all_stanzas(self) -> None:
        """And a packet that several stanzas try is decrypted once."""
        other = SIGNED.replace(SIGNER, SUBKEY)
        made = self.gpg_server(other * 9 + SIGNED)
        made.gate.receive(datagram(self.packet(1)))
        self.assertEqual([DOOR22], self.firewall.doors())
        self.assertIn("(stanza #10) user 'bob'", self.logged())
        self.assertEqual(1, len(self.runs()))
        self.answer("NODATA 1\n")
        for number in range(2, 30):
            made.gate.receive(datagram(self.packet(number)))
        self.assertEqual(server.GPG_BURST, len(self.runs()))

    def test_junk_does_not_start_gpg(self) -> None:
        """Without the id of the key in it, or the HMAC where there is one; or when seen before."""
        made = self.gpg_server()
        for number in range(30):
            made.gate.receive(datagram(self.packet(number, key_id=bytes(8))))
        self.assertEqual([], self.runs())
        self.assertEqual({"gpg decryption": 30}, made.tally.counts)
        self.assertIn("GPG ERROR: No secret key", self.logged())
        for payload in (b"A" * 1500, b"A" * 401, b"hF4D" + b"A" * 401, b"=" * 600):
            made.gate.receive(datagram(payload))
        self.assertEqual([], self.runs())
        made = self.gpg_server(SIGNED + HMAC)
        for number in range(30):
            made.gate.receive(datagram(self.packet(number)))
            made.gate.receive(datagram(self.packet(number, b"wrong")))
        self.assertEqual([], self.runs())
        self.assertEqual({"wrong HMAC": 60}, made.tally.counts)
        for _ in range(20):  # the limit is not for those with an HMAC; but once seen, never again
            made.gate.receive(datagram(self.packet(1, b"hmacKey-for-tests")))
        self.assertEqual(1, len(self.runs()))
        self.assertEqual(19, made.tally.counts["replay"])
        for number in range(10, 20):
            made.gate.receive(datagram(self.packet(number, b"hmacKey-for-tests")))
        self.assertEqual(11, made.tally.counts["accepted"])

    def test_what_was_rejected_is_not_decrypted_again(self) -> None:
        """Who captures a packet that gpg took and we did not can't make gpg run with it."""
        made = self.gpg_server(SIGNED + HMAC)
        self.answer(GOOD.replace("TRUST_FULLY", "TRUST_UNDEFINED"))
        for _ in range(50):
            for number in range(10):
                made.gate.receive(datagram(self.packet(number, b"hmacKey-for-tests")))
        self.assertEqual(10, len(self.runs()))
        self.assertEqual({"gpg signature": 500}, made.tally.counts)

    def test_packets_with_hmac_of_which_nothing_comes(self) -> None:
        """Are limited after a while, too, but never by those without HMAC; genuine ones never."""
        made = self.gpg_server(SIGNED + HMAC + SIGNED)
        for number in range(30):
            made.gate.receive(datagram(self.packet(number)))
        self.assertEqual(server.GPG_BURST, made.tally.counts["accepted"])
        for number in range(100, 200):
            made.gate.receive(datagram(self.packet(number, b"hmacKey-for-tests")))
        self.assertEqual(server.GPG_BURST + 100, made.tally.counts["accepted"])
        self.answer(GOOD.replace("TRUST_FULLY", "TRUST_UNDEFINED"))
        made = self.gpg_server(SIGNED + HMAC)
        payloads = [self.packet(number, b"hmacKey-for-tests") for number in range(100)]
        before = len(self.runs())
        for payload in payloads:
            made.gate.receive(datagram(payload))
        self.assertEqual(server.GPG_HMAC_SECONDS + server.GPG_BURST, len(self.runs()) - before)
        self.assertEqual(100 - 65, made.tally.counts["gpg too fast"])
        self.assertEqual(65, len(made.gate.memory.refused))
        self.clock.pass_seconds(30)
        self.answer(GOOD)  # what was not looked at is not refused for ever
        made.gate.receive(datagram(payloads[-1]))
        self.assertEqual(1, made.tally.counts["accepted"])

    def test_a_gpg_that_hangs(self) -> None:
        """Is killed, once for all stanzas; the packet is rejected, and the next has its turn."""
        made = self.gpg_server(SIGNED * 3)
        for code in ("time.sleep(600)", "status = 'x' * (1 << 22)",
                     "sys.stdout.buffer.write(bytes(1 << 22))"):
            self.answer(GOOD, code)
            start = time.monotonic()
            self.clock.pass_seconds(10)
            with mock.patch.object(server, "GPG_SECONDS", 0.5):
                made.gate.receive(datagram(self.packet(len(code))))
            self.assertLess(time.monotonic() - start, 60)
            self.assertIn("gpg took more than", self.logged())
        self.assertEqual(({"gpg failed": 3}, 3), (made.tally.counts, len(self.runs())))
        self.answer(GOOD)
        made.gate.receive(datagram(self.packet(99)))
        self.assertEqual([DOOR22], self.firewall.doors())

    def test_others_do_not_wait(self) -> None:
        """While gpg hangs other knocks open, and a copy of the packet starts no second gpg. Few run
        at once, the others wait their turn, and at a stop all are ended."""
        key = b"hmacKey-for-tests"
        made = self.gpg_server(SIGNED + HMAC + "SOURCE ANY\n" + KEYS)
        receive = functools.partial(server.Gate.receive, made.gate)
        self.answer(GOOD, "while not os.path.exists(here + '/go'): time.sleep(0.01)")
        packets = [self.packet(number, key) for number in range(6)]
        for packet in packets[:1] * 3 + packets:
            receive(datagram(packet))
            made.gate.go_on_with_gpg()
        self.assertEqual((6, {"gpg too fast": 3}), (len(made.gate.runs), made.tally.counts))
        gpg = made.gate.stanzas[0].gpg.gpg  # whose ration a copy does not use up
        self.assertEqual(self.clock.mono_time - server.GPG_BURST + 7, gpg.busy_until)
        self.assertEqual(server.GPG_AT_ONCE, sum(run.process is not None for run in made.gate.runs))
        receive(datagram(Sender().packet("10.55.0.2,tcp/80", timestamp=int(
            self.clock.wall_time))))
        self.assertEqual(1, made.tally.counts["accepted"])
        self.assertEqual(made.grants.live, self.firewall.rules)
        write(self.place("go"), "")
        made.gate.receive(datagram(self.packet(7, key)))
        self.assertEqual((8, 8), (made.tally.counts["accepted"], len(self.runs()) + 1))
        receive(datagram(packets[0]))
        self.assertEqual(1, made.tally.counts["replay"])
        os.unlink(self.place("go"))
        receive(datagram(self.packet(8, key)))
        made.gate.go_on_with_gpg()
        (run,) = made.gate.runs
        made.stop()
        self.assertEqual(-9, run.process.returncode)
        write(self.place("go"), "")
        receive(datagram(self.packet(9, key)))
        made.settings.packet_limit = made.gate.candidates
        made.stop()  # as after the last packet of -C
        self.assertEqual(9, made.tally.counts["accepted"])

    def test_a_reload_while_gpg_runs(self) -> None:
        """The packet is judged by the stanzas that there are when gpg has ended."""
        made = self.gpg_server(SIGNED + HMAC)
        for access, reason in ((SIGNED + HMAC + "RESTRICT_PORTS tcp/22\n", "ports"),
                               ("SOURCE ANY\n" + KEYS, "encryption type")):
            number = len(self.runs())
            server.Gate.receive(made.gate, datagram(self.packet(number, b"hmacKey-for-tests")))
            made.gate.go_on_with_gpg()
            stanzas = self.stanzas(access)
            server.load_gpg(made.settings, stanzas)
            made.gate.configure(made.configuration._replace(stanzas=stanzas))
            made.gate.receive(datagram(b""))
            self.assertEqual(1, made.tally.counts[reason], made.tally.counts)
        self.assertEqual([], self.firewall.doors())

    def test_a_child_of_gpgs_that_stays(self) -> None:
        """An agent that holds the pipes open does not make the server wait for it."""
        made = self.gpg_server()
        self.answer(GOOD, "pid = os.fork()\nif not pid:\n    time.sleep(60)\n    os._exit(0)\n"
                          "open(here + '/child', 'w').write(str(pid))\n")
        start = time.monotonic()
        made.gate.receive(datagram(self.packet(1)))
        took = time.monotonic() - start
        with open(os.path.join(self.directory, "child")) as file:
            os.kill(int(file.read()), 9)
        self.assertLess(took, 50)
        self.assertEqual([DOOR22], self.firewall.doors())

    def test_a_gpg_that_goes_away(self) -> None:
        """Or that says nothing, or junk, or fails: nothing is opened, nothing left open."""
        made = self.gpg_server(SIGNED + HMAC)
        before = sorted(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else []
        for number, (text, code) in enumerate((
                ("", ""), ("", "sys.exit(2)"), ("\xff" * 50, ""), (GOOD, "sys.exit(1)"),
                (GOOD, "message = b'TEXT'"), (GOOD, "message = b'TEXT' + bytes(3000)"),
                (GOOD, "import atexit; atexit.register(os._exit, 2)"))):
            self.answer(text.encode("latin-1").decode("latin-1"), code)
            made.gate.receive(datagram(self.packet(number, b"hmacKey-for-tests")))
        os.unlink(self.program)
        made.gate.receive(datagram(self.packet(99, b"hmacKey-for-tests")))
        self.assertIn("No such file", self.logged())
        self.assertNotIn("accepted", made.tally.counts)
        self.assertNotIn("error", made.tally.counts)
        if before:
            self.assertEqual(before, sorted(os.listdir("/proc/self/fd")))

    def test_kinds_of_stanzas(self) -> None:
        """A stanza takes the kinds it has keys for; the reason says when none has."""
        symmetric = "SOURCE ANY\nKEY s3cretRijndael\nHMAC_KEY hmacKey-for-tests\n"
        both = SIGNED + "KEY s3cretRijndael\n" + HMAC
        for access, number in ((symmetric + SIGNED + HMAC, (1, 2)), (both, (1, 1)),
                               (SIGNED + HMAC + symmetric, (2, 1))):
            made = self.gpg_server(access)
            self.logged()
            made.gate.receive(datagram(Sender().packet(timestamp=int(self.clock.wall_time),
                                                  rand="%016d" % len(access))))
            made.gate.receive(datagram(self.packet(len(access), b"hmacKey-for-tests")))
            text = self.logged()
            self.assertEqual(2, made.tally.counts["accepted"], text)
            for each in number:
                self.assertIn("(stanza #%d) user 'bob'" % each, text)
            self.clock.pass_seconds(100)
        made = self.gpg_server(symmetric)
        made.gate.receive(datagram(self.packet(1, b"hmacKey-for-tests")))
        self.assertIn("No stanza encryption mode match for encryption type: 2.", self.logged())
        made = self.gpg_server(SIGNED + HMAC)
        made.gate.receive(datagram(Sender().packet()))
        self.assertIn("No stanza encryption mode match for encryption type: 1.", self.logged())
        self.assertEqual({"encryption type": 1}, made.tally.counts)

    def test_the_plaintext_is_remembered(self) -> None:
        """In the file too, so that a message in other words is a replay after a restart as well."""
        made = self.gpg_server()
        message = self.message(1)
        made.gate.receive(datagram(strip(message)))
        with open(self.path) as file:
            digests = [line.split()[0] for line in file if not line.startswith("#")]
        self.assertEqual([server.digest_of(message[message.index(b"TEXT") + 4:]),
                          server.digest_of(strip(message))], digests)
        for boot in range(2):
            made.gate.receive(datagram(strip(message.replace(bytes(268), bytes([boot + 1]) * 268))))
            self.assertEqual({"accepted": 1 - boot, "replay": 1}, {
                "accepted": made.tally.counts["accepted"], "replay": made.tally.counts["replay"]})
            self.assertEqual(2, len(self.runs()) - boot)
            made.gate.memory.close()
            made = self.gpg_server()

    def test_starts_without_gpg_or_key(self) -> None:
        """No gpg, no such key, more than one key: file, line and what is wrong."""
        def error_of(code: str) -> str:
            with open(self.program, "w") as file:
                file.write("#!/bin/sh\n" + code)
            return str(self.gpg_server().gate.stanzas[0].void).replace(self.directory + "/", "")

        for code, expected in (
                ("echo 'gpg: error reading key: No secret key' >&2; exit 2",
                 "expected a secret key: "),
                ("echo 'gpg: invalid option \"--pinentry-mode\"' >&2; exit 2", "invalid option"),
                ("exit 0", "expected the id of one secret key, not of 0"),
                ("echo sec:x; echo sec:y; exit 0", "expected the id of one secret key, not of 2")):
            said = error_of(code)
            self.assertTrue(said.startswith("access.conf:2: GPG_DECRYPT_ID: "), said)
            self.assertIn(expected, said)
        os.unlink(self.program)
        self.assertIn("access.conf:2: GPG_DECRYPT_ID: there is no program",
                      self.gpg_server().gate.stanzas[0].void)


# ------------------------------------------------------------------- the real gpg

def new_length(length: int, octets: int) -> bytes:
    """Return a new-format length of so many octets (RFC 4880 section 4.2.2)."""
    if octets == 1:
        return bytes([length])
    if octets == 2:
        return bytes([((length - 192) >> 8) + 192, (length - 192) & 255])
    return b"\xff" + length.to_bytes(4, "big")


def split_packets(message: bytes) -> List[Tuple[int, bytes]]:
    """Return (tag, body) of the packets of a message, as gpg writes them."""
    found = []
    while message:
        tag = message[0] & 63 if message[0] & 64 else message[0] >> 2 & 15
        body, rest = b"", message[1:]
        if not message[0] & 64:
            size = 1 << (message[0] & 3)
            length, rest = int.from_bytes(rest[:size], "big"), rest[size:]
        else:
            while 224 <= rest[0] < 255:
                length = 1 << (rest[0] & 31)
                body, rest = body + rest[1:1 + length], rest[1 + length:]
            size = 1 if rest[0] < 192 else 5 if rest[0] == 255 else 2
            length = (rest[0] if size == 1 else int.from_bytes(rest[1:5], "big") if size == 5
                      else ((rest[0] - 192) << 8) + rest[1] + 192)
            rest = rest[size:]
        found.append((tag, body + rest[:length]))
        message = rest[length:]
    return found


def other_words(message: bytes) -> Dict[str, bytes]:
    """Return the same message in other encodings, which anybody can make without a key."""
    (key_tag, key), (data_tag, text) = split_packets(message)
    assert (key_tag, data_tag) == (1, 18)
    size = 2 if len(key) >= 192 else 1
    new_key = b"\xc1" + new_length(len(key), size) + key
    old_key = packet_head(len(key))[:-1] + key
    partial = b"\xd2\xe8" + text[:256]  # 2 ** 8 octets at first
    rest = text[256:]
    made = {
        "new format": new_key + b"\xd2" + new_length(len(text), 5) + text,
        "five octets": b"\xc1" + new_length(len(key), 5) + key + b"\xd2"
                       + new_length(len(text), 5) + text,
        "old key, long data": old_key + b"\xd2" + new_length(len(text), 5) + text,
        "marker between": old_key + b"\xca\x03PGP\xd2" + new_length(len(text), 5) + text,
        "another recipient": old_key + b"\x84\x0d\x03" + bytes(range(1, 9)) + b"\x01\x00\x01\x01"
                             + b"\xd2" + new_length(len(text), 5) + text,
    }
    if len(text) > 512 + 192:
        made["partial lengths"] = old_key + partial + new_length(len(rest), 5) + rest
    return {name: each for name, each in made.items() if each != message}


class RealGpgCase(ServerCase):
    """A server whose gpg is the real one, started through a script that counts."""

    ring = None  # type: Any

    def gpg_server(self, access: str, options: str = "") -> Any:
        """Return a server with its GPG stanzas ready; `options` go to gpg first."""
        text = "#!/bin/sh\necho >>%s/runs\nexec gpg %s \"$@\"\n" % (self.directory, options)
        program = write(self.place("gpg"), text, 0o700)
        made = self.serve(access, "GPG_EXE %s;\nGPG_HOME_DIR %s;\n" % (program, self.ring.home))
        server.load_gpg(made.settings, made.gate.stanzas)
        made.gate.configure(made.configuration)
        self.counted()
        return wait_for_gpg(made)

    def counted(self) -> int:
        """Return how many times gpg was started since the last call."""
        path = os.path.join(self.directory, "runs")
        with open(path) as file:
            count = len(file.read().splitlines())
        with open(path, "w"):
            return count


@needs_programs("gpg", "gpgconf")
class VectorTest(SharedCase, RealGpgCase):
    """Packets of the real client, with the keys they were made for."""

    vectors = None  # type: Any

    @classmethod
    def prepare(cls, stack: contextlib.ExitStack) -> None:
        """A home with the server's secret key, and the client's public one, trusted."""
        cls.vectors = read_vectors("fwknop.json")
        keys = cls.vectors["gpg_test_keys"]
        cls.ring = stack.enter_context(Keyring())
        cls.ring.run("--import", text=keys["recipient_secret_armored"].encode())
        with Keyring() as other:
            other.run("--import", text=keys["signer_secret_armored"].encode())
            cls.ring.take(other, SIGNER)
        cls.ring.trust(SIGNER)

    # The keys are of November 2026, which may not have come where this runs.
    then = "--faked-system-time 20261122T180000!"

    def vector(self, name: str) -> Tuple[bytes, Dict[str, Any]]:
        """Return packet and fields."""
        (found,) = [each for each in self.vectors["vectors"] if each["name"] == name]
        return found["packet"].encode(), found["decoded"]

    def test_every_vector(self) -> None:
        """Signed and not, with and without HMAC, NAT and timeout: every field."""
        for name, lines in (
                ("gpg_unsigned", GPG_STANZA + "GPG_DISABLE_SIG Y\n"),
                ("gpg_signed_hmac_sha256", SIGNED + HMAC),
                ("gpg_signed_hmac_sha512_nat_timeout", SIGNED + HMAC + "HMAC_DIGEST_TYPE SHA512\n"),
                ("gpg_signed_hmac_sha256", GPG_STANZA + "GPG_REMOTE_ID 786c8a06\n" + HMAC)):
            with self.subTest(name=name):
                payload, expected = self.vector(name)
                made = self.gpg_server(lines, self.then)
                keys = made.gate.stanzas[0].gpg
                server.check_payload(payload)
                self.assertTrue(server.is_gpg(payload))
                self.assertTrue(is_authentic(payload, keys))
                packet, texts = unlock(payload, keys)
                self.assertEqual([expected["plaintext"].encode(), payload], texts)
                self.assertEqual(
                    (expected["rand"], expected["username"], expected["timestamp"],
                     expected["msg_type"], expected["message"], expected["client_timeout"]),
                    (packet.random, packet.user, packet.timestamp, packet.type, packet.message,
                     packet.timeout))

    def test_one_changed_character(self) -> None:
        """With an HMAC gpg is not even started; without, its integrity check tells."""
        payload, _ = self.vector("gpg_signed_hmac_sha256")
        made = self.gpg_server(SIGNED + HMAC, self.then)
        for at in range(0, len(payload), 7):
            changed = payload[:at] + (b"A" if payload[at:at + 1] != b"A" else b"B") + payload[
                at + 1:]
            self.assertFalse(is_authentic(changed, made.gate.stanzas[0].gpg))
        bare = self.vector("gpg_unsigned")[0]
        made = self.gpg_server(GPG_STANZA + "GPG_DISABLE_SIG Y\n", self.then)
        made.gate.stanzas[0].gpg.gpg.monotonic = lambda: 1e9
        for at in (20, 60, 300, 400, 500, len(bare) - 3):
            made.gate.stanzas[0].gpg.gpg.busy_until = 0
            changed = bare[:at] + (b"A" if bare[at:at + 1] != b"A" else b"B") + bare[at + 1:]
            with self.subTest(at=at), self.assertRaises(server.PacketRejected) as caught:
                unlock(changed, made.gate.stanzas[0].gpg)
            self.assertIn("Decryption operation failed", str(caught.exception))

    def test_a_knock(self) -> None:
        """Through the whole server; then the same packet in other words, and after a restart."""
        self.clock.wall_time = float(VECTOR_TIME)
        payload, _ = self.vector("gpg_unsigned")
        stanza = GPG_STANZA + "GPG_DISABLE_SIG Y\n"
        made = self.gpg_server(stanza, self.then)
        made.gate.receive(datagram(payload))
        self.assertEqual(["10.1.2.3 -> 0.0.0.0/0 tcp/22"], self.firewall.doors(), self.logged())
        self.assertEqual(1, self.counted())
        for again in (payload, payload + b"=", payload + b"=="):
            made.gate.receive(datagram(again))
        self.assertEqual(0, self.counted())  # known without gpg
        message = base64.b64decode(b"hQ" + payload + b"=" * (-len(payload) - 2 & 3))
        for name, each in sorted(other_words(message).items()):
            with self.subTest(name=name):
                made.gate.stanzas[0].gpg.gpg.busy_until = 0
                self.logged()
                replays = made.tally.counts["replay"]
                made.gate.receive(datagram(strip(each)))
                self.assertEqual(1, self.counted())
                self.assertEqual(replays + 1, made.tally.counts["replay"], self.logged())
        self.assertEqual(1, made.tally.counts["accepted"])

    def test_an_hmac_does_not_make_it_another_packet(self) -> None:
        """Captured and sent without its tag to a stanza with the same key and no HMAC."""
        self.clock.wall_time = float(VECTOR_TIME)
        payload, _ = self.vector("gpg_signed_hmac_sha256")
        made = self.gpg_server(SIGNED + HMAC + SIGNED, self.then)
        made.gate.receive(datagram(payload))
        made.gate.receive(datagram(payload[:-43]))
        self.assertEqual({"accepted": 1, "replay": 1}, made.tally.counts, self.logged())


@needs_programs("gpg", "gpgconf")
class KeyTest(SharedCase, RealGpgCase):
    """Keys of several kinds, made here: what fits, what opens, what does not."""

    clients = None  # type: Any
    locked = ""
    recipients, signers = {}, {}  # type: Tuple[Dict[str, str], Dict[str, str]]

    @classmethod
    def prepare(cls, stack: contextlib.ExitStack) -> None:
        """The server's home with a key of each kind; the clients' with good and bad signers."""
        cls.ring = stack.enter_context(Keyring())
        cls.clients = stack.enter_context(Keyring())
        cls.recipients = {kind: cls.ring.generate("s" + kind, encrypts=kind)
                          for kind in ("rsa2048", "rsa3072", "rsa4096")}
        cls.recipients["curve25519"] = cls.ring.generate(
            "curve", options=("--faked-system-time", "20190101T000000"))
        cls.locked = cls.ring.generate("locked", passphrase="open # sesame ")
        for fingerprint in list(cls.recipients.values()) + [cls.locked]:
            cls.clients.take(cls.ring, fingerprint)
        cls.signers = {name: cls.clients.generate(name)
                       for name in ("good", "other", "untrusted", "revoked", "unknown")}
        cls.signers["rsa"] = cls.clients.generate("rsa", "rsa2048")
        cls.signers["expired"] = cls.clients.generate(
            "expired", options=("--faked-system-time", "20200101T000000"), expires="1d")
        for name, fingerprint in cls.signers.items():
            if name != "unknown":
                cls.ring.take(cls.clients, fingerprint)
            if name == "good":
                cls.ring.sign(fingerprint)
            elif name not in ("unknown", "untrusted"):
                cls.ring.trust(fingerprint)
        cls.ring.revoke(cls.clients, cls.signers["revoked"])

    def plain(self) -> bytes:
        """Return a knock of now that was not sent yet."""
        self.number = getattr(self, "number", 0) + 1
        fields = [b"%016d" % self.number, b64(b"bob"), b"%d" % int(self.clock.wall_time),
                  b"3.0.0", b"1", b64(b"10.55.0.2,tcp/22")]
        return Sender().plain(b":".join(fields))

    def packet(self, recipient: str, *options: str, signers: Tuple[str, ...] = (),
               hmac_key: bytes = b"hmacKey-for-tests") -> bytes:
        """Return a packet as a client makes it that strips `hQ` and nothing else."""
        message = self.clients.encrypt(self.plain(), recipient, *options, signers=signers)
        text, body = b64(message), strip(message)
        return body + (b64(hmac.new(hmac_key, text, "sha256").digest()) if hmac_key else b"")

    def stanza(self, recipient: str, *signers: str, lines: str = HMAC) -> str:
        """Return a stanza for packets to this key, signed by one of these."""
        return ("SOURCE ANY\nGPG_DECRYPT_ID %s\nGPG_ALLOW_NO_PW Y\n%s\n%s" % (
            recipient, "GPG_FINGERPRINT_ID " + ",".join(signers) if signers
            else "GPG_DISABLE_SIG Y", lines))

    def test_recipients(self) -> None:
        """RSA 2048 and 3072 and Curve25519, signed and not, with and without HMAC."""
        for kind in ("rsa2048", "rsa3072", "curve25519"):
            for signer in ("", "good", "rsa"):
                for hmac_key in (b"", b"hmacKey-for-tests"):
                    with self.subTest(kind=kind, signer=signer, hmac=bool(hmac_key)):
                        names = (self.signers[signer],) if signer else ()
                        made = self.gpg_server(self.stanza(self.recipients[kind], *names,
                                                           lines=HMAC if hmac_key else ""))
                        payload = self.packet(self.recipients[kind], signers=names,
                                              hmac_key=hmac_key)
                        self.assertLessEqual(len(payload), 1500)
                        made.gate.receive(datagram(payload))
                        self.assertEqual(1, made.tally.counts["accepted"], self.logged())
                        self.assertEqual(1, self.counted())

    def test_lengths(self) -> None:
        """RSA 4096 fits with the signature of a smaller key; what does not fit is rejected."""
        recipient = self.recipients["rsa4096"]
        made = self.gpg_server(self.stanza(recipient, self.signers["good"], self.signers["rsa"]))
        for signer in ("good", "rsa"):
            payload = self.packet(recipient, signers=(self.signers[signer],))
            self.assertLessEqual(len(payload), 1500)
            made.gate.receive(datagram(payload))
        self.assertEqual(2, made.tally.counts["accepted"], self.logged())
        big = self.clients.generate("big", "rsa4096")
        self.ring.take(self.clients, big)
        payload = self.packet(recipient, signers=(big,))
        self.assertGreater(len(payload), 1500)
        made.gate.receive(datagram(payload))
        self.assertEqual(1, made.tally.counts["length"])
        short = self.packet(self.recipients["curve25519"], hmac_key=b"")
        self.assertLess(len(short), 400)  # GPG all the same

    def test_signers(self) -> None:
        """Each of the bad ones opens nothing, and the log says why."""
        recipient = self.recipients["curve25519"]
        made = self.gpg_server(self.stanza(recipient, *[
            self.signers[name] for name in self.signers if name != "other"]))
        for names, expected in (
                (("other",), "Incoming SPA packet signed by: %s, but that fingerprint is not in "
                 "the GPG_FINGERPRINT_ID list." % self.signers["other"]),
                ((), "Missing GPG signature"),
                (("unknown",), "Bad GPG signature - GPG ERROR: ERRSIG"),
                (("revoked",), "Bad GPG signature - GPG ERROR: REVKEYSIG"),
                (("untrusted",), "Bad GPG signature - GPG ERROR: TRUST_UNDEFINED"),
                (("good", "rsa"), "Bad GPG signature - GPG ERROR: expected one signature"),
                (("good", "other"), "Bad GPG signature - GPG ERROR: expected one signature")):
            with self.subTest(names=names):
                made.gate.receive(datagram(self.packet(
                    recipient, signers=tuple(self.signers[name] for name in names))))
                said = self.logged().partition("received with access source match\n")[2]
                self.assertIn(expected, said)
                self.assertEqual({}, self.firewall.rules)
        options = ("--faked-system-time", "20200101T000100")
        expired = self.packet(recipient, *options, signers=(self.signers["expired"],))
        made.gate.receive(datagram(expired))
        self.assertIn("Bad GPG signature - GPG ERROR: EXPKEYSIG", self.logged())
        made.gate.receive(datagram(self.packet(recipient, signers=(self.signers["good"],))))
        self.assertEqual([DOOR22], self.firewall.doors(), self.logged())
        made = self.gpg_server(self.stanza(
            recipient, self.signers["expired"], self.signers["untrusted"],
            lines=HMAC + "GPG_IGNORE_SIG_VERIFY_ERROR Y\n"))
        made.gate.receive(datagram(expired))
        made.gate.receive(datagram(self.packet(recipient, signers=(self.signers["untrusted"],))))
        made.gate.receive(datagram(self.packet(recipient, signers=(self.signers["unknown"],))))
        self.assertEqual({"accepted": 2, "gpg signature": 1}, made.tally.counts, self.logged())

    def test_other_recipients(self) -> None:
        """Another key of the same home is not GPG_DECRYPT_ID; nor is a passphrase a key."""
        mine, other = self.recipients["curve25519"], self.recipients["rsa2048"]
        made = self.gpg_server(self.stanza(mine))
        made.gate.receive(datagram(self.packet(other)))
        self.assertEqual(0, self.counted())
        self.assertIn("GPG ERROR: No secret key", self.logged())
        # The id of our key stands in it, but the session key is encrypted to the other one.
        key_id = bytes.fromhex(self.ring.fingerprints(mine)[1][-16:])
        message = self.clients.encrypt(self.plain(), other)
        disguised = message + b"\xca" + bytes([len(key_id)]) + key_id
        text = b64(disguised)
        tag = b64(hmac.new(b"hmacKey-for-tests", text, "sha256").digest())
        made.gate.receive(datagram(strip(disguised) + tag))
        self.assertEqual(1, self.counted())
        self.assertIn("Decryption operation failed", self.logged())
        both = self.packet(mine, "--recipient", other)
        made.gate.receive(datagram(both))
        self.assertEqual({"gpg decryption": 2, "accepted": 1}, made.tally.counts, self.logged())

    def test_a_passphrase(self) -> None:
        """The right one opens; a wrong one does not, and the log says it, but not which."""
        stanza = "SOURCE ANY\nGPG_DECRYPT_ID %s\nGPG_DISABLE_SIG Y\n%s" % (self.locked, HMAC)
        for passphrase, accepted in (("open # sesame", 0), ("open # sesame ", 1)):
            made = self.gpg_server(stanza + "GPG_DECRYPT_PW %s\n" % passphrase)
            made.gate.receive(datagram(self.packet(self.locked)))
            text = self.logged()
            self.assertEqual(accepted, made.tally.counts["accepted"], text)
            self.assertEqual(not accepted, "is GPG_DECRYPT_PW right?" in text)
            self.assertNotIn(passphrase, text)

    def test_a_bomb(self) -> None:
        """A message that would become far longer than it is costs no memory and little time."""
        recipient = self.recipients["curve25519"]
        made = self.gpg_server(self.stanza(recipient))
        message = self.clients.encrypt(bytes(50000000), recipient, "--compress-algo", "bzip2",
                                       "-z", "9")
        tag = b64(hmac.new(b"hmacKey-for-tests", b64(message), "sha256").digest())
        self.assertLess(len(strip(message) + tag), 1500)
        made.gate.receive(datagram(strip(message) + tag))
        self.assertEqual({"gpg failed": 1}, made.tally.counts, self.logged())

    def test_without_integrity_protection(self) -> None:
        """What gpg decrypts but can't vouch for is rejected."""
        recipient = self.recipients["rsa2048"]
        made = self.gpg_server(self.stanza(recipient))
        made.gate.receive(datagram(self.packet(recipient, "--rfc2440", "--disable-mdc")))
        self.assertIn("GPG ERROR: Bad data", self.logged())
        self.assertEqual({"gpg decryption": 1}, made.tally.counts)

    def test_other_words(self) -> None:
        """A captured message without HMAC, in every other encoding that gpg takes, is a replay."""
        for kind in ("rsa2048", "curve25519"):
            recipient = self.recipients[kind]
            made = self.gpg_server(self.stanza(recipient, self.signers["rsa"], lines=""))
            message = self.clients.encrypt(self.plain(), recipient, "-z", "0",
                                           signers=(self.signers["rsa"],))
            made.gate.receive(datagram(strip(message)))
            self.assertEqual(1, made.tally.counts["accepted"], self.logged())
            others = other_words(message)
            self.assertGreater(len(others), 3)
            for name, each in sorted(others.items()):
                with self.subTest(kind=kind, name=name):
                    made.gate.stanzas[0].gpg.gpg.busy_until = 0
                    replays = made.tally.counts["replay"]
                    self.logged()
                    made.gate.receive(datagram(strip(each)))
                    self.assertEqual(replays + 1, made.tally.counts["replay"], self.logged())
            self.assertEqual(1, made.tally.counts["accepted"])

    def test_no_such_key(self) -> None:
        """The stanza is void, with gpg's words."""
        for name in ("nobody@fko.test", self.signers["good"], "fko.test"):
            with self.subTest(name=name):
                (stanza,) = self.gpg_server(self.stanza(name)).gate.stanzas
                self.assertIn("access.conf:2: GPG_DECRYPT_ID: expected ", stanza.void)


if __name__ == "__main__":
    unittest.main()
