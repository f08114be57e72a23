"""GPG packets of the real fwknop client: what they open, and what nobody can open with them."""

import base64
import contextlib
import functools
import os
import re
import signal
import subprocess
import time
import unittest
from typing import Dict, List, Tuple

from tests.gnupg import Keyring
from tests.netns import (CLIENT4, FWKNOP, HMAC_KEY, KEYS, SERVER4, SPA_CLIENT, SPA_SERVER, STANZA,
                         CableCase, Server)
from tests.support import SharedCase, needs_programs, needs_root, read, wait_for, write
from tests.test_gpg import other_words, strip
from tests.test_live_log import missing

KNOCK = ["-A", "tcp/22", "-a", CLIENT4, "-D", SERVER4]
HMAC = "HMAC_KEY %s\n" % HMAC_KEY
GUARD = "GUARD_PORTS tcp/22;\nFIREWALL_TYPE nft;\n"


@needs_root
@needs_programs("ip", "fwknop", "gpg", "gpgconf")
class LiveGpgTest(SharedCase, CableCase):
    """One cable, one home of the server's, one of the clients', a server for each test."""

    server_ring: Keyring
    client_ring: Keyring
    recipients: Dict[str, str]
    signers: Dict[str, str]

    @classmethod
    def prepare(cls, stack: contextlib.ExitStack) -> None:
        """Make the keys: the client's and the server's know each other, as fwknop wants it."""
        cls.server_ring = stack.enter_context(Keyring())
        cls.client_ring = stack.enter_context(Keyring())
        cls.recipients = {kind: cls.server_ring.generate("server" + kind, encrypts=kind)
                          for kind in ("rsa2048", "rsa3072")}
        cls.recipients["other"] = cls.client_ring.generate("elsewhere", encrypts="rsa2048")
        for kind in ("rsa2048", "rsa3072"):
            cls.client_ring.take(cls.server_ring, cls.recipients[kind])
        for fingerprint in cls.recipients.values():
            cls.client_ring.trust(fingerprint)
        cls.signers = {name: cls.client_ring.generate(name, kind)
                       for name, kind in (("good", "rsa3072"), ("second", "curve25519"),
                                          ("wrong", "rsa2048"), ("untrusted", "rsa2048"),
                                          ("revoked", "rsa2048"), ("unknown", "rsa2048"))}
        for name, fingerprint in cls.signers.items():
            if name != "unknown":
                cls.server_ring.take(cls.client_ring, fingerprint)
            if name not in ("unknown", "untrusted"):
                cls.server_ring.trust(fingerprint)
        cls.server_ring.revoke(cls.client_ring, cls.signers["revoked"])

    def stanza(self, *signers: str, lines: str = "", recipient: str = "rsa2048") -> str:
        """Return a stanza for one recipient that these may sign for; none: nobody is asked."""
        names = ",".join(self.signers[each] for each in signers)
        return ("SOURCE ANY\nGPG_HOME_DIR %s\nGPG_DECRYPT_ID %s\nGPG_ALLOW_NO_PW Y\n%s\n"
                "FW_ACCESS_TIMEOUT 300\n%s"
                % (self.server_ring.home, self.recipients[recipient],
                   "GPG_FINGERPRINT_ID " + names if signers else "GPG_DISABLE_SIG Y", lines))

    def serve(self, access: str, config: str = "", *options: str) -> Server:
        """Start a server."""
        return Server(self.cable.server, config, access, *options).start()

    def options(self, signer: str = "", recipient: str = "rsa2048",
                hmac_key: str = HMAC_KEY) -> List[str]:
        """Return the client's options."""
        words = ["--gpg-encryption", "--gpg-home-dir", self.client_ring.home,
                 "--gpg-no-signing-pw", "--gpg-recipient-key", self.recipients[recipient]]
        words += ["--gpg-signer-key", self.signers[signer]] if signer else []
        return words + (["--key-hmac", hmac_key] if hmac_key else []) + KNOCK

    def knock(self, server: Server, *arguments: str, expect: str = " opened ",
              **more: str) -> str:
        """Send a packet of the real client; return the line with `expect`."""
        return server.knock(self.client, *self.options(*arguments, **more), program=FWKNOP,
                            keys=[], expect=expect)

    @needs_programs("nft")
    def test_a_knock_opens_the_port(self) -> None:
        """Signed, with HMAC: the port was closed, and is open."""
        self.cable.server.listen(22)
        server = self.serve(self.stanza("good", lines=HMAC), GUARD)
        self.assertFalse(self.client.reaches(SERVER4, 22))
        line = self.knock(server, "good")
        self.assertIn("opened %s -> 0.0.0.0/0 tcp/22 for 300 seconds" % CLIENT4, line)
        wait_for(lambda: self.client.reaches(SERVER4, 22, seconds=2), "the open port")
        self.assertIn("Incoming SPA data signed by '%s' (fingerprint '%s')."
                      % (self.signers["good"][-8:], self.signers["good"]), server.log())
        self.assertEqual(0, server.stop())

    def test_kinds(self) -> None:
        """Recipients and signers of several kinds, with and without signature and HMAC."""
        for recipient, signer, hmac_key in (
                ("rsa2048", "good", ""), ("rsa2048", "second", ""), ("rsa2048", "", HMAC_KEY),
                ("rsa2048", "", ""), ("rsa3072", "second", HMAC_KEY), ("rsa3072", "good", ""),
                ("rsa3072", "", HMAC_KEY)):
            with self.subTest(recipient=recipient, signer=signer, hmac=bool(hmac_key)):
                access = self.stanza(*[signer] * bool(signer), lines=HMAC if hmac_key else "",
                                     recipient=recipient)
                server = self.serve(access, "", "-t")
                self.knock(server, signer, recipient, hmac_key=hmac_key)
                self.assertEqual(0, server.stop())

    @needs_programs("nft")
    def test_what_opens_nothing(self) -> None:
        """Wrong signer, none, one we do not know, trust or that was revoked; wrong recipient."""
        self.cable.server.listen(22)
        server = self.serve(self.stanza("good", "untrusted", "revoked", "unknown", lines=HMAC),
                            GUARD)
        for arguments, hmac_key, expected in (
                (("wrong",), HMAC_KEY, "Incoming SPA packet signed by: %s, but that fingerprint is "
                 "not in the GPG_FINGERPRINT_ID list." % self.signers["wrong"]),
                (("",), HMAC_KEY, "Error creating fko context: Missing GPG signature"),
                (("unknown",), HMAC_KEY, "Bad GPG signature - GPG ERROR: ERRSIG"),
                (("untrusted",), HMAC_KEY, "Bad GPG signature - GPG ERROR: TRUST_UNDEFINED"),
                (("revoked",), HMAC_KEY, "Bad GPG signature - GPG ERROR: REVKEYSIG"),
                (("good", "other"), HMAC_KEY, "Decryption operation failed - GPG ERROR: No secret"),
                (("good",), "wrong", "FKO_ERROR_INVALID_DATA_HMAC_COMPAREFAIL"),
                (("good",), "", "FKO_ERROR_INVALID_DATA_HMAC_COMPAREFAIL")):
            with self.subTest(arguments=arguments, hmac_key=hmac_key):
                line = self.knock(server, *arguments, hmac_key=hmac_key, expect=expected)
                self.assertTrue(line.startswith("[%s] (stanza #1) " % CLIENT4), line)
        self.assertNotIn(" opened ", server.log())
        self.assertFalse(self.client.reaches(SERVER4, 22))
        self.knock(server, "good")

    def test_a_stanza_with_both(self) -> None:
        """KEY and GPG in one stanza: each packet is opened by its own, from either client."""
        server = self.serve(self.stanza("good", lines=HMAC + "KEY testkey\n"), "", "-t")
        self.knock(server, "good")
        for program in (FWKNOP, SPA_CLIENT):
            server.knock(self.client, *KNOCK, program=program, keys=KEYS)

    def packet(self, *arguments: str, **more: str) -> str:
        """Return a packet of the real client, which was sent where nobody listens."""
        path = self.client.path("packet")
        self.client.run(*FWKNOP, *self.options(*arguments, **more), "-p", "9", "-B", path)
        with open(path) as file:
            return file.read().strip()

    def test_a_captured_packet(self) -> None:
        """Sent again, as it was and in other words, without HMAC, and after a restart."""
        access = self.stanza("good")
        server = self.serve(access, "", "-t")
        payload = self.packet("good", hmac_key="")
        message = base64.b64decode("hQ" + payload + "=" * (-len(payload) - 2 & 3))
        others = [strip(each).decode() for _, each in sorted(other_words(message).items())]
        self.assertGreater(len(others), 3)
        self.client.send(SERVER4, 62201, payload)
        server.wait_for(" opened ")
        for restarted in range(2):
            for again in [payload, payload + "="] + others[:4]:
                mark = server.mark()
                self.client.send(SERVER4, 62201, again)
                server.wait_for("Replay detected from source IP: " + CLIENT4, mark)
            if not restarted:
                server.stop()
                server.start()
        self.assertNotIn(" opened ", server.log())

    def counting(self) -> Tuple[str, str]:
        """Return a gpg that counts its runs, and the file it counts in."""
        directory = self.cable.server.path("gpg")
        os.mkdir(directory)
        runs = os.path.join(directory, "runs")
        program = write(os.path.join(directory, "gpg"), "#!/bin/sh\ncase \"$*\" in *--decrypt*) "
                        "echo >>%s;; esac\nexec gpg \"$@\"\n" % runs, 0o700)
        with open(runs, "w"):
            return program, runs

    def test_a_flood_without_hmac(self) -> None:
        """Junk that names the right key starts gpg a few times; a knock later gets through."""
        program, runs = self.counting()
        server = self.serve(self.stanza("good"), "GPG_EXE %s;\n" % program, "-t")
        payload = self.packet("good", hmac_key="")
        junk = [payload[:300] + "%04d" % number + "0" * 200 for number in range(300)]
        self.client.send(SERVER4, 62201, *junk)
        self.client.send(SERVER4, 62201, *["A" * 1000] * 50)
        server.wait_for("GPG packets without HMAC come too fast")

        def opened() -> bool:
            self.client.run(*FWKNOP, *self.options("good", hmac_key=""))
            return " opened " in server.log()

        wait_for(opened, "a knock after the flood")
        server.stop()
        with open(runs) as file:
            self.assertLessEqual(len(file.read().splitlines()), 30)
        self.assertRegex(server.log(), r"Packets seen: .*\b[1-9]\d\d gpg too fast")

    @staticmethod
    def has_lines(server: Server, mark: int, text: str, count: int) -> bool:
        """Say whether the log has so many lines with a text."""
        return bool(server.log(mark).count(text) == count)

    @staticmethod
    def stop_process(pid: int) -> None:
        """Stop a process; a signal that comes while one of its threads ends may have no effect."""
        def has_stopped() -> bool:
            """Send the signal once more, and say whether it has worked."""
            os.kill(pid, signal.SIGSTOP)
            return "(stopped)" in read("/proc/%d/status" % pid)

        wait_for(has_stopped, "a process that has stopped")

    def test_an_agent_that_hangs(self) -> None:
        """Other knocks open meanwhile; the packet is rejected in time, or opens when the agent goes
        on; a stop does not wait for it."""
        server = self.serve(self.stanza("good", lines=HMAC) + STANZA, "", "-t")
        self.knock(server, "good")
        answer = subprocess.check_output(
            ["gpg-connect-agent", "--homedir", self.server_ring.home, "GETINFO pid", "/bye"])
        agent = int(answer.split()[1])
        self.addCleanup(os.kill, agent, signal.SIGCONT)
        for goes_on, count, expect in ((False, 1, "gpg took more than 5 seconds"),
                                       (True, 3, " opened ")):
            self.stop_process(agent)
            mark = server.mark()
            for _ in range(count):
                self.client.run(*FWKNOP, *self.options("good"))
            server.knock(self.client, *KNOCK)
            self.assertNotIn("gpg took", server.log(mark))
            self.assertEqual(1, server.log(mark).count(" opened "), server.log())
            if goes_on:
                os.kill(agent, signal.SIGCONT)
            wait_for(functools.partial(self.has_lines, server, mark, expect, count + goes_on),
                     lambda: expect + " in:\n" + server.log())  # noqa: B023
            os.kill(agent, signal.SIGCONT)
        self.stop_process(agent)
        self.client.run(*FWKNOP, *self.options("good"))
        server.knock(self.client, *KNOCK)
        began = time.monotonic()
        self.assertEqual(0, server.stop())
        self.assertLess(time.monotonic() - began, 3)

    def test_starts_and_reloads(self) -> None:
        """A missing key or gpg makes its stanza void, until a reload finds it; others open."""
        good = self.stanza("good", lines=HMAC)
        bad = good.replace(self.recipients["rsa2048"], self.signers["good"])
        for access, config, expected in (
                (bad, "", ":3: GPG_DECRYPT_ID: expected a secret key: "),
                (good, "GPG_EXE /no/such/gpg;\n", ":3: GPG_DECRYPT_ID: there is no program /no/s"),
                (good.replace(self.server_ring.home, "/no/such/home"), "",
                 ":3: GPG_DECRYPT_ID: expected a secret key: ")):
            server = Server(self.cable.server, config, access)
            code, text = server.command("--exit-parse-config")
            self.assertEqual(3, code, text)
            self.assertIn(expected, text)
            code, text = server.command("-D")
            self.assertEqual(0, code, text)
        server = self.serve(bad + STANZA, "", "-t")
        self.assertIn("; this stanza opens nothing", server.log())
        server.knock(self.client, *KNOCK)
        for access, name in ((good, "good"), (self.stanza("wrong", lines=HMAC), "wrong")):
            server.configure(access=access)
            mark = server.mark()
            server.send_signal(1)
            server.wait_for("Re-starting fwknopd", mark)
            self.knock(server, name)

    @needs_programs("fwknopd", "iptables")
    def test_fwknopd_reads_the_same_stanza(self) -> None:
        """The real server opens to the same packets by the same access.conf."""
        server = Server(self.cable.server, "ENABLE_UDP_SERVER Y;\n", self.stanza("good"))
        daemon = self.cable.server.start("fwknopd", "-f", "-t", *server.files)
        daemon.wait_for("Kicking off UDP server")
        self.client.run(*FWKNOP, *self.options("good", hmac_key=""))
        daemon.wait_for("--test mode enabled, skipping firewall manipulation.")
        self.assertIn("fingerprint '%s'" % self.signers["good"], daemon.output())

    @needs_programs("fwknopd", "iptables")
    def test_a_signer_that_nobody_named(self) -> None:
        """Both servers show the packet and its signer with -v -v, and reject it."""
        label, signer = r"^\[10\.55\.0\.2\] \(stanza #1\) ", self.signers["wrong"]
        begin = (
            label + r"SPA Decode \(res=0\):$", r"^ Message String: 10\.55\.0\.2,tcp/22$",
            label + f"Incoming SPA data signed by '{signer[-8:]}' .fingerprint '{signer}'.\\.$")
        access = self.stanza("good")
        for stanza, end in (
                (access, f"signed by: {signer}, but that fingerprint is not in"),
                (re.sub("GPG_FINGERPRINT_ID .*(.{8})", r"GPG_REMOTE_ID \1", access),
                 f"signed by ID: {signer[-8:]}, but that ID is not in the GPG_REMOTE_ID list")):
            site = Server(self.cable.server, "PCAP_INTF eth0;\n", stanza)
            for program in (["fwknopd"], SPA_SERVER):
                daemon = self.cable.server.start(*program, "-f", "-t", "-v", "-v", *site.files)
                daemon.wait_for(Server.READY)
                self.client.run(*FWKNOP, *self.options("wrong", hmac_key=""))
                wait_for(lambda text=daemon.output, patterns=(  # type: ignore[misc]
                    *begin, label + "Incoming SPA packet " + end): not missing(patterns, text()),
                    daemon.output)
                daemon.end()

    def test_the_agent_holds_nothing(self) -> None:
        """After a kill the next server starts: gpg-agent lives on, and has no lock or socket."""
        server = self.serve(self.stanza("good", lines=HMAC), "", "-t", "-U")
        self.knock(server, "good")
        server.stop(9)
        subprocess.check_call(["gpg-connect-agent", "--homedir", self.server_ring.home,
                               "--no-autostart", "/bye"])
        server.start()
        self.knock(server, "good")


if __name__ == "__main__":
    unittest.main()
