"""Where ours differs from fwknop 2.6.10 on purpose: what, why, and inputs that show it.

KINDS is the table in README's "fwknop: what differs". Each row of ROWS is an input of a kind: ours
refuses it, and the real program, where it is installed, takes it without doing what it says. The
rows of BEHAVIOUR are no lines of a file: each names the test that shows it.
"""

import os
import shlex
from typing import List

from tests import test_client
from tests.support import TOP, needs_programs, needs_root, read, run
from tests.test_config import KEYED, ConfigCase
from tests.test_dropin import ACCESS, FWKNOPD, RC

# name of a kind: (examples, what fwknop makes of them)
KINDS = {
    "number": ("`MAX_SPA_PACKET_AGE 20m`, `OPEN_PORTS tcp/22-25`, `TIME_OFFSET 1week`",
               "20 seconds, port 22, 1 second: a number ends where its digits do"),
    "rest": ("`OPEN_PORTS tcp/22; udp/53`, `tcp/22 udp/53`", "tcp/22: the rest is dropped"),
    "yes": ("`REQUIRE_SOURCE_ADDRESS true`, `1`, `on`", "N: only a Y at its beginning is yes"),
    "name": ("`RESTRICT_PORT tcp/25`, `PCAP_INTF=lo`, a line without a value, unknown names in "
             "access.conf", "ignored"),
    "keys": ("`RESTRICT_PORTS` in a file of `%include_keys`, which takes keys alone", "skipped"),
    "value": ("`SOURCE 010.0.0.1`, `ACCESS_EXPIRE 31/12/2030`", "8.0.0.1; a day in July 2032"),
    "needs": ("`FORWARD_ALL Y` without `ENABLE_IPT_FORWARDING`, `FORCE_SNAT` without "
              "`ENABLE_IPT_SNAT`, `GPG_DECRYPT_ID` without a passphrase",
              "logged as done at most; nothing comes of it"),
    "two": ("`KEY` and `KEY_BASE64` in one stanza", "one of them never opens"),
    "never": ("`OPEN_PORTS tcp/ssh`, `REQUIRE_USERNAME a, b`, a key that is too long, a cycle "
              "whose program is missing or names an unknown `$VARIABLE`",
              "the start goes well, and no packet ever fits"),
    "filter": ("`PCAP_FILTER` with more than ports, hosts, networks and protocols", "works there"),
}
DAEMON, RC_FILE, OPTIONS = "options of fwknopd", "~/.fwknoprc", "options of fwknop"

# (kind, where the input is, the input, what our error has)
ROWS = (
    ("number", FWKNOPD, "MAX_SPA_PACKET_AGE 20m;", "seconds, 1 to 100000"),
    ("number", FWKNOPD, "UDPSERV_PORT 62201/udp;", "a number, 1 to 65535"),
    ("number", ACCESS, "FW_ACCESS_TIMEOUT 1h", "seconds, 0 to 8388608"),
    ("number", ACCESS, "FW_ACCESS_TIMEOUT 0x20", "seconds, 0 to 8388608"),
    ("number", ACCESS, "FW_ACCESS_TIMEOUT 1e3", "seconds, 0 to 8388608"),
    ("number", ACCESS, "FW_ACCESS_TIMEOUT \"60\"", "seconds, 0 to 8388608"),
    ("number", ACCESS, "FW_ACCESS_TIMEOUT = 60", "seconds, 0 to 8388608"),
    ("number", ACCESS, "OPEN_PORTS tcp/22-25", "expected tcp/PORT or udp/PORT"),
    ("number", ACCESS, "OPEN_PORTS tcp/22:25", "expected tcp/PORT or udp/PORT"),
    ("number", ACCESS, "ACCESS_EXPIRE_EPOCH tomorrow", "seconds, 0 to 100000000000"),
    ("number", RC_FILE, "FW_TIMEOUT 60.5", "a number of seconds, 0 to 65536"),
    ("number", RC_FILE, "FW_TIMEOUT 5m", "a number of seconds, 0 to 65536"),
    ("number", RC_FILE, "SPA_SERVER_PORT 62201/udp", "a port number, 1 to 65535"),
    ("number", RC_FILE, "TIME_OFFSET 1x", "a time such as 90"),
    ("number", DAEMON, "-C x", "a number, 0 to 1000000000"),
    ("number", OPTIONS, "-f abc", "a number of seconds, 0 to 65536"),
    ("number", OPTIONS, "--nat-port 0", "a port number, 1 to 65535"),
    ("number", OPTIONS, "--fd x", "a file descriptor, 0 to 1048576"),
    ("number", OPTIONS, "-p 0", "a port number, 1 to 65535"),
    ("rest", FWKNOPD, "ENABLE_SPA_OVER_HTTP Y; ENABLE_TCP_SERVER Y;", "behind the semicolon"),
    ("rest", ACCESS, "OPEN_PORTS tcp/22;udp/53", "behind the semicolon"),
    ("rest", ACCESS, "OPEN_PORTS tcp/22 udp/53", "expected tcp/PORT or udp/PORT"),
    ("rest", ACCESS, "OPEN_PORTS tcp/22\ttcp/23", "expected tcp/PORT or udp/PORT"),
    ("rest", ACCESS, "RESTRICT_PORTS tcp/25 # x, tcp/26", "no comma in the comment"),
    ("rest", ACCESS, "SOURCE 10.0.0.1;10.0.0.2\nKEY x", "behind the semicolon"),
    ("rest", ACCESS, "RESTRICT_PORTS tcp/25; (x), tcp/26", "behind the semicolon"),
    ("rest", ACCESS, "RESTRICT_PORTS tcp/25 (x) tcp/26", "nothing behind the parenthesis"),
    ("rest", ACCESS, "KEY s3;(cret", "behind the semicolon"),
    ("rest", ACCESS, "KEY s3;//cret", "behind the semicolon"),
    ("rest", ACCESS, "OPEN_PORTS tcp/22\nKNOCK_SEQUENCE 7000 (x) 8000", "behind the parenthesis"),
    ("yes", FWKNOPD, "ENABLE_SPA_OVER_HTTP true;", "expected Y or N"),
    ("yes", FWKNOPD, "FLUSH_IPT_AT_INIT maybe;", "expected Y or N"),
    ("yes", FWKNOPD, "VERBOSE Y;", "a number, 0 to 99"),
    ("yes", ACCESS, "REQUIRE_SOURCE_ADDRESS 1", "expected Y or N"),
    ("yes", ACCESS, "REQUIRE_SOURCE_ADDRESS \"Y\"", "expected Y or N"),
    ("yes", RC_FILE, "USE_HMAC true", "expected Y or N"),
    ("yes", RC_FILE, "NAT_LOCAL 1", "expected Y or N"),
    ("name", FWKNOPD, "RESTRICT_PORT tcp/25;", "unknown directive, expected RESTRICT_PORTS"),
    ("name", FWKNOPD, "RESTRICT_PORTS tcp/25;", "this belongs in access.conf"),
    ("name", FWKNOPD, "GUARDPORTS tcp/25;", "unknown directive, expected GUARD_PORTS"),
    ("name", FWKNOPD, "NFT_ACCEPT_CHAIN inet x y;", "expected NFT_ACCEPT_CHAINS"),
    ("name", FWKNOPD, "PACP_INTF lo;", "unknown directive, expected PCAP_INTF"),
    ("name", FWKNOPD, "PCAP_INTF: lo;", "PCAP_INTF: expected a blank after it, not ':'"),
    ("name", FWKNOPD, "PCAP_INTF=lo;", "PCAP_INTF: expected a blank after it, not '='"),
    ("name", FWKNOPD, "PCAP_FILE ;", "PCAP_FILE: expected a value"),
    ("name", FWKNOPD, "[main]", "a stanza with a [name] is the client's"),
    ("name", FWKNOPD, "// a comment", "unknown directive"),
    ("name", FWKNOPD, "DIGEST_FILE $NO_SUCH/x;", "the name of a directive after the dollar sign"),
    ("name", ACCESS, "RESTRICT_PORT tcp/25", "unknown directive, expected RESTRICT_PORTS"),
    ("name", ACCESS, "require_source_address Y", "expected REQUIRE_SOURCE_ADDRESS"),
    ("name", ACCESS, "source ANY", "unknown directive, expected SOURCE"),
    ("name", ACCESS, "CMD_REGEX ^ls", "CMD_REGEX: unknown directive"),
    ("name", ACCESS, "NO_SUCH_NAME 1", "NO_SUCH_NAME: unknown directive"),
    ("name", ACCESS, "PERMIT_CLIENT_TIMEOUT N", "expected Y: here, OPEN_PORTS and"),
    ("name", DAEMON, "gate", "unexpected argument 'gate'"),
    ("name", OPTIONS, "-n ''", "the name of a stanza"),
    ("keys", ACCESS, "%include_keys keys", "expected only keys here"),
    ("keys", ACCESS, "%include_keys no-such-file", "was not found"),
    ("value", ACCESS, "SOURCE 010.0.0.1\nKEY x", "ANY, or IP addresses and networks"),
    ("value", ACCESS, "SOURCE 10.1\nKEY x", "ANY, or IP addresses and networks"),
    ("value", ACCESS, "ACCESS_EXPIRE 31/12/2030", "MM/DD/YYYY"),
    ("value", ACCESS, "ACCESS_EXPIRE 02/30/2030", "MM/DD/YYYY"),
    ("value", ACCESS, "ACCESS_EXPIRE 12/31/2030 23:59", "MM/DD/YYYY"),
    ("value", RC_FILE, "ALLOW_IP 010.1.1.1", "an IPv4 or IPv6 address"),
    ("value", RC_FILE, "SPA_SERVER 127.0.0.1:62201", "a name or an address, without port"),
    ("value", OPTIONS, "-N :22", "a host, or host:port"),
    ("value", OPTIONS, "-U ''", "a user name of 1 to 48 characters"),
    ("needs", ACCESS, "FORWARD_ALL Y", "requires ENABLE_IPT_FORWARDING"),
    ("needs", ACCESS, "GPG_DECRYPT_ID 12345678", "GPG_DECRYPT_PW as well"),
    ("needs", ACCESS, "ENCRYPTION_MODE Asymmetric", "GPG_DECRYPT_ID, or the mode of KEY"),
    ("needs", ACCESS, "CMD_SUDO_EXEC_USER nobody\nENABLE_CMD_EXEC Y", "ENABLE_CMD_SUDO_EXEC with"),
    ("needs", ACCESS, "CMD_CYCLE_TIMER 3", "CMD_CYCLE_OPEN with it"),
    ("needs", OPTIONS, "-b", "-b needs -B"),
    ("two", ACCESS, "KEY_BASE64 YWJj", "only one of KEY and KEY_BASE64"),
    ("two", ACCESS, "HMAC_KEY_BASE64 YWJj", "only one of HMAC_KEY and HMAC_KEY_BASE64"),
    ("two", OPTIONS, "-G /no/such/file", "cannot be read"),
    ("never", FWKNOPD, "PCAP_INTF lo, eth0;", "the name of one interface"),
    ("never", FWKNOPD, "SNAT_TRANSLATE_IP host;", "expected an IP address"),
    ("never", FWKNOPD, "UDPSERV_PORT 70000;", "a number, 1 to 65535"),
    ("never", FWKNOPD, f"IPT_INPUT_ACCESS ACCEPT, filter, INPUT, 1, {'X' * 35}, 1;",
     "a chain of our own of at most 28 characters"),
    ("never", ACCESS, "GPG_FINGERPRINT_ID 123", "40 hex digits"),
    ("never", ACCESS, "GPG_REMOTE_ID 123", "8 or 16 or 40 hex digits"),
    ("never", ACCESS, "DESTINATION 1.2.3", "ANY, or IP addresses and networks"),
    ("never", ACCESS, "OPEN_PORTS tcp/ssh", "expected tcp/PORT or udp/PORT"),
    ("never", ACCESS, "OPEN_PORTS tcp/0", "expected tcp/PORT or udp/PORT"),
    ("never", ACCESS, "REQUIRE_USERNAME joe, bob", "characters as they are allowed"),
    ("never", ACCESS, "REQUIRE_USERNAME \"joe\"", "characters as they are allowed"),
    ("never", ACCESS, "KEY " + "x" * 33, "a key of 1 to 32 bytes, not 33"),
    ("never", ACCESS, "HMAC_KEY " + "x" * 129, "a key of 1 to 128 bytes, not 129"),
    ("never", ACCESS, "MAX_FW_TIMEOUT 0", "seconds, 1 to 8388608"),
    ("never", ACCESS, "CMD_CYCLE_OPEN /no/such\nCMD_CYCLE_CLOSE NONE", "a program that can be run"),
    ("never", ACCESS, "CMD_CYCLE_OPEN true\nCMD_CYCLE_CLOSE none\nCMD_CYCLE_TIMER 5",
     "a program that can be run"),
    ("never", ACCESS, "CMD_CYCLE_OPEN /bin/true $FOO\nCMD_CYCLE_CLOSE NONE", "only $IP, $SRC"),
    ("filter", FWKNOPD, "PCAP_FILTER icmp[icmptype] = 8;", "expected udp, tcp, icmp"),
    ("filter", FWKNOPD, "PCAP_FILTER udp port domain;", "expected udp, tcp, icmp"),
    ("filter", FWKNOPD, "PCAP_FILTER ether host 00:00:00:00:00:01;", "expected udp, tcp, icmp"),
)

# (what differs, why, the module of tests and the test that shows it)
BEHAVIOUR = (
    ("FLUSH_IPT_AT_INIT is N; SIGHUP keeps grants, too", "a restart locks nobody out",
     "test_live_firewall.test_reload_stop_and_start"),
    ("an interface that does not exist is waited for", "networks come up after daemons",
     "test_live.test_an_interface_that_is_not_there_yet"),
    ("a bad file on SIGHUP keeps the old settings", "a slip locks nobody out",
     "test_live.test_reload"),
    ("packets from before --rotate-digest-cache are rejected", "else they open twice",
     "test_live_control.test_rotated_digests"),
    ("-K waits for the end, and sends no SIGKILL", "what is open has to be closed",
     "test_live_control.test_kill_comes_back_after_the_end"),
    ("--key-gen-file makes a new file, for its owner", "keys are lost, or read by others",
     "test_files.test_keys_in_a_file"),
    ("CMD_EXEC_USER runs a cycle's commands, too", "it says who runs a stanza's commands",
     "test_commands.test_accounts"),
    ("OPEN_PORTS and MAX_FW_TIMEOUT hold for cycles, which open every port of a request",
     "they limit the stanza", "test_commands.test_every_port"),
    ("a cycle is closed after SIGTERM, SIGHUP and a crash", "else it stays open",
     "test_live_commands.test_a_killed_server"),
    ("CMD_EXEC_TIMEOUT ends commands", "it says so", "test_commands.test_timeout"),
    ("FW_ACCESS_TIMEOUT 0 opens nothing unless the client asks for a time", "0 is not 30",
     "test_server.test_table"),
    ("a key with and without HMAC opens once for each packet", "twice is a replay",
     "test_server.test_a_key_with_and_without_hmac"),
    ("NAT translates every port of a request", "all were asked for",
     "test_live_nat.test_round_trip"),
    ("NAT leads to 127.0.0.1 for clients on this host alone", "the kernel drops what others send",
     "test_live_nat.test_what_is_not_enabled"),
    ("X-Forwarded-For may have more than one address, and ports", "proxies write them",
     "test_dropin.test_forwarded"),
    ("ENABLE_X_FORWARDED_FOR rejects requests without that header", "no proxy sent it",
     "test_live_carriers.test_a_request_past_the_proxy"),
    ("a jump to a position that its chain does not have yet is made at the end",
     "there it is logged, and not made", "test_live_firewall.test_a_chain_of_another_name"),
    ("wrong options end with 2, unusable files with 3; fwknop has 0 and 1",
     "scripts can tell them apart", "test_config.test_exit_codes"),
    ("-V names this program, its version and its SHA-256", "it is no fwknop",
     "test_config.test_version"),
    ("--pcap-file ends with the file", "there is no more to hear",
     "test_live_carriers.test_a_capture_of_all_carriers"),
    ("-C counts packets that look like SPA", "junk would end the server",
     "test_live_carriers.test_packet_limit"),
    ("each port of a request has a line `Added ...`", "it can be open already, or end alone",
     "test_log.test_what_is_open_already"),
    ("-v logs no key, no line of access.conf and no hex dump", "logs are kept and shown",
     "test_live_log.test_both"),
    ("-v shows a packet whose key is proven", "junk would fill the log",
     "test_server.test_verbose"),
    ("the fields of a GPG packet have no `GPG ...` lines", "a line of its own tells who signed it",
     "test_live_gpg.test_a_signer_that_nobody_named"),
    ("-T shows a GPG packet without decrypting it", "only the server should have that key",
     "test_client_fwknop.test_unsigned"),
    ("MASQUERADE without --to-ports", "with it one connection at a time passes",
     "test_live_nat.test_translated_sources"),
    ("--save-rc-stanza ends when the answers end", "fwknop asks for ever",
     "test_client_fwknop.test_save_stanza_asks"),
    ("the client writes no rc file, and no keys to ~/.fwknop.run", "nobody asked for a copy",
     "test_client_fwknop.test_arguments_are_kept_without_keys"),
    ("the client refuses what no fwknopd understands", "a knock that opens nothing is an error",
     "test_client_fwknop.test_long_command"),
    ("checksums of raw packets are right", "some routers drop the others",
     "test_client_fwknop.test_raw"),
    ("unknown names in fwknopd.conf and ~/.fwknoprc are warned of", "fwknop refuses the latter",
     "test_dropin.test_names_that_nobody_knows"),
)


class ServerDifferenceTest(ConfigCase):
    """Lines of fwknopd.conf and access.conf."""

    def files(self, file: str, line: str) -> List[str]:
        """Write the two files, one of them with this line, and return the options for them."""
        self.write("keys", "KEY k3y2\nRESTRICT_PORTS tcp/25\n")
        line = line.replace("%include_keys ", "%include_keys " + self.directory + "/")
        texts = {FWKNOPD: "PCAP_INTF lo;\n", ACCESS: KEYED}
        options = shlex.split(line) if file == DAEMON else []
        texts[file] = texts.get(file, "") + line + "\n"
        return ["-c", self.write(FWKNOPD, texts[FWKNOPD]), "-a", self.write("a", texts[ACCESS]),
                *options]

    def test_ours(self) -> None:
        """Each stops the start, with its line or option."""
        for kind, file, line, expected in ROWS:
            if file in (FWKNOPD, ACCESS, DAEMON):
                with self.subTest(kind=kind, line=line):
                    code, _, said = self.main("--exit-parse-config", *self.files(file, line),
                                              *self.override())
                    self.assertEqual(2 if file == DAEMON else 3, code, said)
                    self.assertIn(expected, said)
                    self.assertRegex(said, r"(fwknopd\.conf|/a|/keys):\d+: |spa_server.py: ")

    @needs_programs("fwknopd")
    @needs_root
    def test_fwknopd(self) -> None:
        """fwknopd starts with each."""
        for kind, file, line, _ in ROWS:
            if file in (FWKNOPD, ACCESS, DAEMON):
                with self.subTest(kind=kind, line=line):
                    ended = run(["fwknopd", "-D", *self.files(file, line)], cwd=self.directory)
                    self.assertEqual(0, ended.returncode, ended.stdout + ended.stderr)

    def test_tests(self) -> None:
        """The tests that show other differences exist, and so do rows of every kind."""
        self.assertEqual(set(KINDS), {kind for kind, _, _, _ in ROWS})
        for what, _, shown in BEHAVIOUR:
            module, _, name = shown.partition(".")
            with self.subTest(what):
                text = read(os.path.join(TOP, "tests", module + ".py"))
                self.assertTrue(f"def {name}(" in text, shown)


class ClientDifferenceTest(test_client.Case):
    """Lines of ~/.fwknoprc, and options."""

    def words(self, place: str, text: str) -> List[str]:
        """Write the rc file, and return the options."""
        self.write(RC + (text + "\n" if place == RC_FILE else ""))
        return ["-T", *(shlex.split(text) if place == OPTIONS else ())]

    def test_ours(self) -> None:
        """Each is an error of one line, which has the directive or the option."""
        for kind, place, text, expected in ROWS:
            if place in (RC_FILE, OPTIONS):
                with self.subTest(kind=kind, text=text):
                    code, _, said = self.run_main(*self.words(place, text))
                    self.assertIn(code, (2, 3), said)
                    self.assertIn(expected, said)

    @needs_programs("fwknop")
    def test_fwknop(self) -> None:
        """fwknop makes a packet with each."""
        for kind, place, text, _ in ROWS:
            if place in (RC_FILE, OPTIONS):
                with self.subTest(kind=kind, text=text):
                    ended = run(["fwknop", *self.words(place, text)], env=self.environment)
                    self.assertEqual(0, ended.returncode, ended.stdout + ended.stderr)
