"""What people have in files and scripts: an input, what fwknop or knockd does, what ours does.

Each row of a table is shown to the real program too, where it is installed, so that no row rots.
Here is what a file or option may look like; what it does is in the tests of that part.
"""

import os
import re
import subprocess
import sys
import time
from typing import Any, List
from unittest import mock

import spa_client as client
import spa_server as server
from tests import test_client
from tests.support import compiled, needs_programs, needs_root, run
from tests.test_config import KEYED, ConfigCase
from tests.test_knock_open import KnockCase
from tests.test_packet import Sender

TAKEN, SKIPPED, REFUSED = "taken", "skipped", "refused"
FWKNOPD, ACCESS = "fwknopd.conf", "access.conf"

# (file, line, what fwknopd 2.6.10 does with it, ours): ours takes it without a word (""), with a
# warning that has these words, or refuses it with an error that has the words behind a "!". What
# ours alone refuses is in test_differences.
LINES = (
    (FWKNOPD, "ACCESS_FILE access.conf;", TAKEN, ""),
    (FWKNOPD, "ACCESS_FILE /no/such/file;", TAKEN, ""),  # -a names another one
    (FWKNOPD, "ACCESS_FILE ~nobody;", TAKEN, ""), (FWKNOPD, "VERBOSE 10", TAKEN, ""),
    (FWKNOPD, "GPG_HOME_DIR gh;", TAKEN, ""), (FWKNOPD, "DIGEST_FILE x/dig;", TAKEN, ""),
    (FWKNOPD, "MAX_SPA_PACKET_AGE +20;", TAKEN, ""), (FWKNOPD, "VERBOSE 1 # x", TAKEN, ""),
    (FWKNOPD, "MAX_SPA_PACKET_AGE 20 seconds;", TAKEN, ""),
    (FWKNOPD, "MAX_SPA_PACKET_AGE 20s;", TAKEN, ""), (FWKNOPD, "CMD_EXEC_TIMEOUT 0;", TAKEN, ""),
    (FWKNOPD, "ENABLE_SPA_OVER_HTTP false;", TAKEN, ""),  # and so N, as it says
    (FWKNOPD, "ENABLE_SPA_OVER_HTTP y ; # x", TAKEN, ""),
    (FWKNOPD, "ENABLE_SPA_OVER_HTTP disabled; // x", TAKEN, ""),
    (FWKNOPD, "PCAP_INTF \"eth0\";", TAKEN, "!the name of one interface"),  # it does not exist
    (FWKNOPD, "SNAT_TRANSLATE_IP __CHANGEME__;", TAKEN, ""),
    (FWKNOPD, "SNAT_TRANSLATE_IP __CHANGEME__;\nENABLE_IPT_SNAT Y;", REFUSED, "!an IP address"),
    (FWKNOPD, "NFT_TABLE inet fw4;", SKIPPED, "NFT_TABLE is ignored: GUARD_PORTS and NFT_ACCEPT"),
    (FWKNOPD, "ENABLE_NFT_FIREWALL Y;", SKIPPED, "ENABLE_NFT_FIREWALL is ignored: GUARD_PORTS"),
    (FWKNOPD, "ENABLE_NFT_FORWARDING Y;", SKIPPED, "ENABLE_NFT_FORWARDING is ignored: GUARD_"),
    (FWKNOPD, "NFQ_CHAIN ;", TAKEN, "NFQ_CHAIN is ignored: it belongs to another build"),
    (FWKNOPD, "LOCALE", TAKEN, "LOCALE is ignored: nothing here"),
    (FWKNOPD, "DISABLE_NAT Y;", SKIPPED, "DISABLE_NAT is ignored: NAT is off unless"),
    (FWKNOPD, "AUTH_MODE FKO_PCAP;", SKIPPED, "AUTH_MODE is ignored: this server has no such"),
    (FWKNOPD, "product_mode 7;", SKIPPED, "product_mode is ignored: this server has no such"),
    (ACCESS, "GPG_HOME_DIR gh", TAKEN, ""), (ACCESS, "FW_ACCESS_TIMEOUT +60", TAKEN, ""),
    (ACCESS, "keytype Base 64 key", TAKEN, "keytype is ignored: tools and older releases"),
    (ACCESS, "hkeytype Base 64 key", TAKEN, "hkeytype is ignored"),
    (ACCESS, "GPG_NO_OPTIONS Y", TAKEN, "GPG_NO_OPTIONS is ignored: tools and older"),
    (ACCESS, "DATA_COLLECT_MODE: PCAP;", TAKEN, "DATA_COLLECT_MODE is ignored"),
    (ACCESS, "ENABLE_FORWARD_ACCESS: Y;", TAKEN, "ENABLE_FORWARD_ACCESS is ignored: tools and"),
    (ACCESS, "PERMIT_CLIENT_PORTS: Y;", TAKEN, "PERMIT_CLIENT_PORTS is ignored: as in fwknopd 2.6"),
    (ACCESS, "FW_ACCESS_TIMEOUT 60 # s", TAKEN, ""), (ACCESS, "OPEN_PORTS tcp/22 # x", TAKEN, ""),
    (ACCESS, "FW_ACCESS_TIMEOUT 60 sec", TAKEN, ""), (ACCESS, "OPEN_PORTS TCP/ 22", TAKEN, ""),
    (ACCESS, "FW_ACCESS_TIMEOUT 60 // s", TAKEN, ""), (ACCESS, "MAX_FW_TIMEOUT 60,", TAKEN, ""),
    (ACCESS, "FW_ACCESS_TIMEOUT\t\v\f60", TAKEN, ""),
    (ACCESS, "FW_ACCESS_TIMEOUT 60 (a minute)", TAKEN, ""),
    (ACCESS, "OPEN_PORTS tcp/22 (ssh), udp/53 // x", TAKEN, ""),
    (ACCESS, "DESTINATION 10.0.0.0/24 # office", TAKEN, ""),
    (ACCESS, "DESTINATION 10.0.0.0/24 # a, 10.0.1.0/24", REFUSED, "!no comma in the comment"),
    (ACCESS, "GPG_DECRYPT_ID 12345678 # x", TAKEN, "!GPG_DECRYPT_PW as well"),
    (ACCESS, "FORCE_NAT 10.0.0.1 22 # x", REFUSED, "!requires either ENABLE_IPT_FORWARDING"),
    (ACCESS, "ACCESS_EXPIRE 1/1/2031 // x", TAKEN, ""),
    (ACCESS, "ACCESS_EXPIRE 1/1/31,", TAKEN, ""),
    (ACCESS, "ACCESS_EXPIRE 1/1/99", TAKEN, ""), (ACCESS, "ACCESS_EXPIRE_EPOCH 0", TAKEN, ""),
    (ACCESS, "DESTINATION 10.0.0.1, any", TAKEN, ""),  # any
    (ACCESS, "SUDO_EXE /usr/bin/sudo", TAKEN, "it has an effect in fwknopd.conf only"),
    (ACCESS, "CMD_SUDO_EXEC_USER nobody", TAKEN, ""),  # there are no commands to run
    (ACCESS, "CMD_EXEC_GROUP root", TAKEN, "CMD_EXEC_GROUP has no effect without CMD_EXEC_USER"),
    (ACCESS, "CMD_EXEC_GROUP daemon\nCMD_EXEC_USER nobody", TAKEN, ""),
    (ACCESS, "CMD_EXEC_GROUP nobody\nCMD_EXEC_USER nobody", TAKEN, None),  # test_command_groups
    (ACCESS, "CMD_EXEC_GROUP no-such", REFUSED, "!expected a group of this host"),
    (ACCESS, "CMD_CYCLE_OPEN sh -c \"echo $SRC\"\nCMD_CYCLE_CLOSE NONE", TAKEN,
     "CMD_CYCLE_* and ON_*: no shell reads them, so that quotes and"),
    (ACCESS, "CMD_CYCLE_OPEN echo $IP > /tmp/x\nCMD_CYCLE_CLOSE NONE", TAKEN, "CMD_CYCLE_* and"),
    (ACCESS, "ON_OPEN logger \"$IP is in\"", TAKEN, "CMD_CYCLE_* and ON_*"),
    (ACCESS, "ON_CLOSE logger $IP out", TAKEN, ""),
    (ACCESS, "CMD_CYCLE_OPEN echo --a=$IP a&b\nCMD_CYCLE_CLOSE NONE", TAKEN, ""),
)
PATHS = (  # relative ones, all of which begin where the server was started
    (FWKNOPD, "GPG_HOME_DIR", "gpg_home"), (FWKNOPD, "ACCESS_FILE", "access_file"),
    (FWKNOPD, "FWKNOP_RUN_DIR", "run_directory"), (FWKNOPD, "FIREWALL_EXE", "firewall_program"),
    (ACCESS, "GPG_HOME_DIR", "gpg_home"), (ACCESS, "GPG_EXE", "gpg_program"),
)


class ServerLineTest(ConfigCase):
    """Lines of fwknopd.conf and access.conf."""

    def files(self, file: str, line: str) -> List[str]:
        """Write the two files, one with this line, and return the options that name them."""
        os.makedirs(self.place("gh"), exist_ok=True)
        texts = {FWKNOPD: "PCAP_INTF lo;\n", ACCESS: KEYED + "OPEN_PORTS tcp/22\n"}
        texts[file] += line + "\n"
        return ["-c", self.write(FWKNOPD, texts[FWKNOPD]), "-a", self.write("a", texts[ACCESS])]

    def test_ours(self) -> None:
        """Each line is taken in silence, with its warning, or refused."""
        for file, line, _, wanted in LINES:
            if wanted is None:  # it depends on the host
                continue
            with self.subTest(line=line):
                code, _, said = self.main(*self.files(file, line), *self.override(),
                                          "--exit-parse-config")
                self.assertEqual(3 if wanted[:1] == "!" else 0, code, said)
                self.assertIn(wanted.lstrip("!"), said)
                name = re.split("_OPEN|[ :]", line)[0]
                self.assertEqual(bool(wanted), name in said, said)

    def test_comments(self) -> None:
        """A value ends before its comment, and the comment of a list has no comma."""
        ports, seconds = {("tcp", 22), ("udp", 53)}, server.integer(0, 99, "seconds")
        for parse, text, value in (
                (seconds, "60 // x", 60), (seconds, "60 (a minute)", 60), (seconds, "60,", 60),
                (server.parse_ports, "tcp/22 (ssh, x), udp/53", None),
                (server.parse_ports, "tcp/22 (ssh), udp/53 // x", ports),
                (server.parse_ports, "tcp/22 // x, udp/53", None),
                (server.parse_steps, "22 (a),53:udp // x", ((server.TCP, 22), (server.UDP, 53))),
                (server.key_ids(8), "abcdef12, 12345678 # joe", {"ABCDEF12", "12345678"}),
                (server.key_ids(8), "ABCDEF12,", {"ABCDEF12"}),
                (lambda text: list(map(str, server.Networks(text).networks)),
                 "10.0.0.0/8 (office), 192.168.0.1 # home", ["10.0.0.0/8", "192.168.0.1/32"]),
                (lambda text: "{} {}".format(*server.parse_nat_target(text)), "10.0.0.1 22 # x",
                 "10.0.0.1 22")):
            with self.subTest(text):
                if value is None:
                    self.assertRaises(ValueError, parse, text)
                else:
                    self.assertEqual(value, parse(text))

    @needs_programs("fwknopd")
    @needs_root
    def test_fwknopd(self) -> None:
        """fwknopd does with each line what the table says."""
        for file, line, wanted, _ in LINES:
            with self.subTest(line=line):
                ended = run(["fwknopd", "-D", *self.files(file, line)], cwd=self.directory)
                said = ended.stdout + ended.stderr
                self.assertEqual(wanted, REFUSED if ended.returncode else SKIPPED if re.search(
                    r"Ignoring unknown configuration param|\[\*\] Ignor", said) else TAKEN, said)

    def test_relative_paths(self) -> None:
        """They begin where the server was started, also when it reads them again as a daemon."""
        for file, name, attribute in PATHS:
            for directory, begins in (("", os.getcwd()), ("/srv", "/srv")):
                with self.subTest(name=name, directory=directory):
                    options = self.files(file, name + " sub/x")
                    options = options[:2] if name == "ACCESS_FILE" else options
                    arguments = server.Arguments(options)
                    found: Any = server.read_settings(arguments, directory=directory)[0]
                    if file == ACCESS:
                        found = server.read_configuration(arguments, directory).stanzas[0]
                    self.assertEqual(begins + "/sub/x", getattr(found, attribute))

    def test_programs_by_name(self) -> None:
        """A name without a directory is a program of PATH; fwknopd runs FIREWALL_EXE so.

        It is never one of the directory that root starts the server in, which may be /tmp.
        """
        os.environ["PATH"], before = self.directory, os.environ["PATH"]
        self.addCleanup(os.environ.__setitem__, "PATH", before)
        os.symlink("/bin/sh", self.place("iptables"))
        for name, path in (("iptables", self.place("iptables")), ("./x", os.getcwd() + "/./x"),
                           ("no-such", "/usr/sbin/no-such")):
            settings = self.settings_of(*self.files(FWKNOPD, f"FIREWALL_EXE {name};"))
            self.assertEqual(path, settings.firewall_program)

    def test_command_groups(self) -> None:
        """Where no group has that name, a user's stands for that user's main group; with a warning.
        """
        user = server.Account("nobody", "nogroup", 65534, 65534, (65534,))
        with mock.patch.object(server, "find_group", lambda text: None), \
                mock.patch.object(server, "parse_account", lambda text: user):
            stanzas, said = server.read_stanzas(self.write(
                "a", KEYED + "CMD_EXEC_USER nobody\nCMD_EXEC_GROUP nobody\n"))
        self.assertEqual(65534, stanzas[0].command_group)
        self.assertIn("there is no group nobody; the main group of that user", "\n".join(said))


# (an address of X-Forwarded-For, what ours makes of it); fwknopd rejects those with a port
FORWARDED = (
    ("10.0.0.2", "10.0.0.2"), ("10.0.0.2:53211", "10.0.0.2"), ("fd99::2", "fd99::2"),
    ("[fd99::2]:4000", "fd99::2"), ("[fd99::2]", "fd99::2"), ("fd99::2:4000", "fd99::2:4000"),
    ("10.0.0.2:", None), ("10.0.0.2:0", None), ("10.0.0.2:65536", None), ("[fd99::2]:", None),
    ("[fd99::2]x:4000", None), ("10.0.0.2:80:80", None), (":80", None), ("[]:80", None), ("", None),
)


class PacketTest(ConfigCase):
    """Packets of older clients, and through proxies."""

    def test_forwarded(self) -> None:
        """A proxy may write the client's port behind the address."""
        for text, address in FORWARDED:
            with self.subTest(text=text):
                if address is None:
                    self.assertRaises(ValueError, server.parse_forwarded, text)
                else:
                    self.assertEqual(address, str(server.parse_forwarded(text)))

    def test_legacy_packets_without_padding(self) -> None:
        """libfko 2.0.3 sends 112 bytes without padding. With and without it, it is one packet."""
        sender, fields = Sender(b"k3y", b"", "LEGACY"), b""
        for length in range(1, 17):
            fields = sender.plain(b":".join((b"1234567890123456", server.encode_base64(
                b"u" * length), b"1", b"1.9.12", b"1", server.encode_base64(b"1.2.3.4,tcp/22"))))
            if len(fields) % 16 == 0:
                break
        self.assertEqual(0, len(fields) % 16)
        keys = server.PacketKeys(b"k3y", "LEGACY", b"", server.DIGESTS["SHA256"])
        bare, texts = server.unlock(sender.seal_blocks(fields), keys)
        padded, more = server.unlock(sender.seal(fields), keys)
        self.assertEqual(bare, padded)
        self.assertEqual(fields, texts[0])
        self.assertEqual(texts[0], more[0])  # so that it opens once, in whichever spelling
        self.assertNotEqual(texts[-1], more[-1])
        for end in (b"\x11" * 16, b"a" * 16, b"\0" * 16, b"\x03" * 2 + b"x" * 14):
            with self.assertRaises(server.PacketRejected):
                server.unlock(sender.seal_blocks(fields + end), keys)
        with self.assertRaises(server.WrongKey):
            server.unlock(Sender(b"k3y", b"", "CBC").seal_blocks(fields), server.PacketKeys(
                b"k3y", "CBC", b"", server.DIGESTS["SHA256"]))
        # Beside a stanza with the same key in another mode, that one remembers the fields, too.
        stanzas, _ = server.read_stanzas(self.write("a", "".join(
            f"SOURCE ANY\nKEY {'k' * 16}\n{line}\n" for line in (
                "HMAC_KEY h", "ENCRYPTION_MODE CBC", "ENCRYPTION_MODE legacy"))))
        for stanza, hmac_key in zip(stanzas, (b"h", b"", b"")):
            payload = Sender(b"k" * 16, hmac_key, "CBC").seal(fields)
            assert stanza.keys
            self.assertIn(fields, server.unlock(payload, stanza.keys)[1])


# ------------------------------------------------------------------------- the client

# (TIME_OFFSET, seconds that fwknop 2.6.10 adds, seconds that ours adds or None: refused)
OFFSETS = (
    ("+1h", 3600, 3600), ("+90", 90, 90), ("+1H", 3600, 3600), ("-1h", -3600, -3600),
    ("-+5", -5, -5), ("++7", 7, 7), ("60M", 3600, 3600), ("010", 10, 10),
    ("+-5", 5, None), ("--5", -5, None), ("5x", 5, None), ("1week", 1, None), ("1.5h", 54000, None),
)
# (line of ~/.fwknoprc that both programs take, attribute of our settings, value)
RC_LINES = (
    ("FW_TIMEOUT +30", "timeout", 30), ("FW_TIMEOUT 30s", "timeout", 30),
    ("FW_TIMEOUT 30sec", "timeout", 30), ("FW_TIMEOUT 30,", "timeout", 30),
    ("NAT_LOCAL false", "nat_local", False), ("NAT_LOCAL 0", "nat_local", False),
    ("SPA_SERVER_PORT +62202", "port", 62202), ("SPA_SERVER_PORT 62202,", "port", 62202),
    ("NAT_PORT +22", "nat_port", 22), ("ENCRYPTION_MODE Legacy", "mode", "legacy"),
    ("RESOLVE_URL x.example/ip", "resolve_url", ("http://x.example/ip", "x.example", 80, "/ip")),
    ("SPA_SERVER: 127.0.0.1", "server", "127.0.0.1"), ("VERBOSE 4", "verbose", True),
    ("SPOOF_USER bob;", "user", "bob"), ("ACCESS tcp/22 # x", "access", "tcp/22"),
)
RC = ("[default]\nSPA_SERVER 127.0.0.1\nALLOW_IP 10.0.0.1\nACCESS tcp/22\nNO_SAVE_ARGS Y\n"
      "KEY abc\nHMAC_KEY def\n")


class ClientTest(test_client.Case):
    """~/.fwknoprc and options."""

    def test_offsets(self) -> None:
        """TIME_OFFSET may have a sign; what fwknop reads as another time is refused."""
        for text, _, seconds in OFFSETS:
            with self.subTest(text=text):
                if seconds is None:
                    self.assertRaises(ValueError, client.parse_offset, text)
                else:
                    self.assertEqual(seconds, client.parse_offset(text))
        for name, seconds in (("plus", 3600), ("minus", -3600)):
            given = client.parse_command_line([f"--time-offset-{name}=+1h"])[0]["TIME_OFFSET"]
            self.assertEqual(seconds, client.parse_offset(given.text))

    @needs_programs("fwknop")
    def test_offsets_of_fwknop(self) -> None:
        """fwknop reads the offsets as the table says."""
        for text, seconds, _ in OFFSETS:
            with self.subTest(text=text):
                self.write(RC + f"TIME_OFFSET {text}\n")
                said = run(["fwknop", "-T", "-v"], env=self.environment).stdout
                stamp = re.search(r"Timestamp: (\d+)", said)
                self.assertTrue(stamp, said)
                self.assertAlmostEqual(int(stamp.group(1)) if stamp else 0,
                                       time.time() + seconds, delta=30)

    def test_rc_lines(self) -> None:
        """Each line has its value here."""
        for line, attribute, value in RC_LINES:
            with self.subTest(line=line):
                given = client.parse_stanza(RC + line, "rc", "default")
                self.assertEqual(value, getattr(client.Settings(given or {}), attribute))
        for text in ("tcp/+22", "tcp/22-+25", "tcp/-22"):
            self.assertRaises(ValueError, client.parse_access, text)

    @needs_programs("fwknop")
    def test_rc_lines_of_fwknop(self) -> None:
        """fwknop takes these lines without a word."""
        for line, _, _ in RC_LINES:
            with self.subTest(line=line):
                legacy = RC.replace("HMAC_KEY def\n", "")
                self.write((legacy if "Legacy" in line else RC) + line + "\n")
                ended = run(["fwknop", "-T"], env=self.environment)
                self.assertEqual((0, ""), (ended.returncode, ended.stderr), ended.stdout)

    def test_names_that_nobody_knows(self) -> None:
        """fwknop refuses them; ours warns, unless one is a slip or belongs to the server."""
        for line, code, wanted in (
                ("CLIENT_MODE x", 0, ":8: CLIENT_MODE is ignored: this client has no such"),
                ("ALOW_IP 1.2.3.4", 3, ":8: ALOW_IP: expected the name of a directive"),
                ("OPEN_PORTS tcp/22", 3, "this belongs in access.conf on the server")):
            self.write(RC + line + "\n")
            found, _, said = self.run_main("-T")
            self.assertEqual(code, found, said)
            self.assertIn(wanted, said)

    def test_options(self) -> None:
        """-v -v is saved as 2, the HMAC's option has a second name, and a missing file a hint."""
        options = ("-n", "gate", "-D", "127.0.0.1", "-A", "tcp/22", "-a", "10.0.0.1", "-T",
                   "--key-base64-rijndael", "YWJj", "--hmac-key-base64", "ZGVm", "--save-rc-stanza")
        for count, level in ((1, "Y"), (2, "2"), (5, "4")):
            path = self.write("[default]\n")
            self.assertEqual(0, self.run_main(*options, *["-v"] * count)[0])
            with open(path) as file:
                text = file.read()
            self.assertRegex(text, f"\nVERBOSE +{level}\n")
            self.assertRegex(text, "\nHMAC_KEY_BASE64 +ZGVm\n")
        self.assertIn("--save-rc-stanza with -n, -D and -A makes it", self.run_main(
            "--rc-file", self.place("new"), "-T")[2])
        # Nothing is saved, so that there is nothing to ask about.
        self.assertEqual(0, self.run_main(*options[:11], "--force-stanza", "--fw-timeout=30s")[0])

    def test_a_page_that_sees_the_loopback(self) -> None:
        """-R takes a loopback address where the server is reached by one, and only there."""
        for name, page, server_address, taken in (
                ("::1 there", "::1", "::1", True), ("both 127", "127.0.0.1", "127.0.0.1", True),
                ("mapped", "::ffff:127.0.0.1", "127.0.0.1", True),
                ("nobody's", "0.0.0.0", "127.0.0.1", False),
                ("far", "127.0.0.1", "192.0.2.1", False)):
            link = mock.Mock()
            link.getpeername.return_value = (server_address, 62201)
            with self.subTest(name):
                if taken:
                    self.assertEqual(page.replace("::ffff:", ""), client.check_own(page, "", link))
                else:
                    self.assertRaises(client.SpaError, client.check_own, page, "", link)


# ------------------------------------------------------------------------- knockd

PORTS, NUMBER, ONLY_COMMANDS = "!without quotes", "!expected seconds", "!only a command may be"
# (lines, what knockd 0.8 does with them, ours, which refuses them for the reason behind a "!").
# Lines without a section stand in a door [a]; with Start_ or Cmd_ first, below its sequence. If
# both take them, both show the same values.
KNOCKD_LINES = (
    ("Sequence = 7000,8000", TAKEN, ""), ("SEQUENCE=7000,8000", TAKEN, ""),
    ("\tsequence\t=\t7000,\t8000 , 9000  ", TAKEN, ""), ("\v\fSequence = 7000", TAKEN, ""),
    ("sequence = 2222:udp,3333:TCP,4444 : Udp", TAKEN, ""), ("sequence = 07000,+8000", TAKEN, ""),
    ("sequence = 7000,8000 # x", TAKEN, ""), ("sequence = 7000\nsequence = 8000,9000", TAKEN, ""),
    ("sequence = 7000 (a),8000 // x", TAKEN, ""),
    ("sequence = 7000 # a,8000", TAKEN, "!no comma in the comment"),  # both ports, there
    ("sequence = " + ",".join(map(str, range(7000, 7032))), TAKEN, ""),
    ("sequence = " + ",".join(map(str, range(7000, 7033))), REFUSED, "!at most 32 ports"),
    ("sequence: 7000,8000", REFUSED, ONLY_COMMANDS), ("sequence 7000", REFUSED, ONLY_COMMANDS),
    # There these ports are 0, -1, or the number before the other characters.
    ("sequence = \"7000,8000\"", TAKEN, PORTS), ("sequence == 7000,8000", TAKEN, PORTS),
    ("sequence = 7000,8000,", TAKEN, PORTS), ("sequence = 7000,,8000", TAKEN, PORTS),
    ("sequence = 7000 8000", TAKEN, PORTS), ("sequence = 7000;8000", TAKEN, "!a blank before"),
    ("sequence = 7000 ; x\nTimeout = 5;", TAKEN, ""),
    ("sequence = 7000-7005", TAKEN, PORTS), ("sequence = ssh,8000", TAKEN, PORTS),
    ("sequence = \xa07000,8000", TAKEN, PORTS), ("sequence = 0x1b58", TAKEN, PORTS),
    ("sequence = -1,8000", TAKEN, PORTS), ("sequence = 7000:udp:8000", TAKEN, PORTS),
    ("sequence =", TAKEN, ONLY_COMMANDS), ("sequence = 7000:", REFUSED, PORTS),
    ("sequence = 7000:sctp", REFUSED, PORTS), ("sequence = 65536", REFUSED, PORTS),
    ("One_Time_Sequences = HERE/ones", TAKEN, ""), ("one_time_sequences = ones", TAKEN, ""),
    ("One_Time_Sequences = \"ones\"", REFUSED, '!"ones": No such file'),
    ("One_Time_Sequences = /no/such", REFUSED, "!/no/such: No such file"),
    ("sequence = 7000\none_time_sequences = ones", TAKEN, "!only one of them"),
    ("Start_Command = /sbin/iptables -I INPUT -s %IP% -j ACCEPT", TAKEN, ""),
    ("Start_Command = \"/bin/echo\" a=b # c; d", TAKEN, ""), ("Start_Command =", TAKEN, ""),
    ("Start_Command = a\nCommand = b\nCommand_6 = c\nStop_Command_6 =", TAKEN, ""),
    ("Start_Command = voil\xe0 \\\nStop_Command = b", TAKEN, ""),
    ("Start_Command a", REFUSED, ONLY_COMMANDS),
    ("Start_Commands = a", REFUSED, "!unknown directive"),
    ("Cmd_Timeout = 3600\nStop_Command = x\nTimeout = 5", TAKEN, ""),
    ("Cmd_Timeout = 30s\nSeq_Timeout = 100000 # x", TAKEN, ""), ("Cmd_Timeout = +5", TAKEN, ""),
    ("Cmd_Timeout = 5 (s)\nSeq_Timeout = 9, // s", TAKEN, ""),
    ("Cmd_Timeout = ten", TAKEN, NUMBER), ("Cmd_Timeout = 1.5", TAKEN, NUMBER),  # 0 and 1 there
    ("Cmd_Timeout = 10m", TAKEN, NUMBER), ("Cmd_Timeout = -1", TAKEN, NUMBER),
    ("Cmd_Timeout = 5\nSeq_Timeout = 0", TAKEN, NUMBER),  # it opens only if it has one port
    ("Start_Command = a\nTCPFlags = syn,!ACK\ntcpflags = !rst,syn", TAKEN, ""),
    ("Start_Command = a\nTCPFlags = syn, ack", REFUSED, "!with commas between, no blanks"),
    ("Start_Command = a\nTCPFlags = syn|ack", REFUSED, "!with commas between"),
    ("Start_Command = a\nTCPFlags = syn,ece", REFUSED, "!with commas between"),
    ("Start_Command = a\nTCPFlags =", REFUSED, ONLY_COMMANDS),
    ("Start_Command = a\nTarget = 127.0.0.1", TAKEN, ""),
    ("Start_Command = a\nTarget = localhost", TAKEN, "!expected an IP address"),  # never opens
    ("Start_Command = a\nSeq_Cooldown = 60", REFUSED, ""),  # its forks take it
    ("[options]\nUseSyslog\nlogfile = HERE/log\n[open SSH]\nsequence = 7000", TAKEN, ""),
    ("[a]\nsequence = 7000\nUseSyslog\n[options]\nPidFile = HERE/pid\ninterface = lo", TAKEN, ""),
    ("[options]\n[options]\nusesyslog\n[a]\nsequence = 7000\n[a]\nsequence = 7000", TAKEN, ""),
    ("[options]\nUseSyslog = yes\n[a]\nsequence = 7000", REFUSED, "!expected UseSyslog alone"),
    ("[Options]\nUseSyslog\n[a]\nsequence = 7000", REFUSED, "!expected Sequence or One_Time"),
    ("[a]\ncommand = x", REFUSED, "!expected Sequence or One_Time"),
    ("[options]\ntimeout = 5\n[a]\nsequence = 7000", REFUSED, "!unknown directive"),
    ("[a]\nsequence = 7000\npidfile = /x", REFUSED, "!expected in the section [options]"),
    ("UseSyslog\n[a]\nsequence = 7000", REFUSED, "!alone, in a section"),
    ("[a]b]\n  # x\n\nsequence = 7000\n#[c]", TAKEN, ""), ("[a]\r\nsequence = 7000\r", TAKEN, ""),
    ("[a] # x\nsequence = 7000", REFUSED, "!its name between [ and ]"),
    ("[]\nsequence = 7000", REFUSED, "!its name between [ and ]"),
    ("; x\n[a]\nsequence = 7000", REFUSED, "!a section first"), ("#", TAKEN, ""),
)


class KnockdTest(KnockCase):
    """knockd.conf as it is published, and what its forks read."""

    def write_lines(self, lines: str) -> str:
        """Write a knockd.conf that the files of KNOCKD_LINES may stand in; return its path."""
        head = "" if lines[0] in "[;#U" else (
            "[a]\n" if re.match(r"\s*(one_time_)?sequence", lines, re.I) else
            "[a]\nSequence = 7000,9000,8000\n")
        path = os.path.join(self.directory, "knockd.conf")
        for name, text in ((path, head + lines.replace("HERE", self.directory) + "\n"),
                           (os.path.join(self.directory, "ones"), "7000,9000\n")):
            with open(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w",
                      encoding="latin-1", newline="") as file:
                file.write(text)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.directory)
        return path

    def values(self, lines: str) -> List[str]:
        """Return what ours makes of a file, in the words of knockd -D."""
        said, file = [], server.read_knockd(self.write_lines(lines))
        names = {server.TCP: "tcp", server.UDP: "udp"}
        for door in file.doors:
            steps = ",".join(f"{port}:{names[kind]}" for kind, port in door.sequence.steps)
            said.append(f"config: {door.name}: sequence: {steps}")
            for row in (server.KnockdDoor.start, server.KnockdDoor.start6, server.KnockdDoor.stop,
                        server.KnockdDoor.stop6, server.KnockdDoor.knock_seconds,
                        server.KnockdDoor.stop_seconds):
                if door.is_set(row):
                    value = getattr(door, row.attribute)
                    said.append(f"config: {door.name}: {row.name.lower().split()[0]}: "
                                f"{'' if value is None else value}")
        return said

    def test_lines(self) -> None:
        """Ours takes each of the files, or refuses it with a reason."""
        for lines, _, wanted in KNOCKD_LINES:
            with self.subTest(lines):
                try:
                    self.values(lines)
                    self.assertEqual("", wanted)
                except server.ConfigError as error:
                    self.assertEqual("!", wanted[:1], error)
                    self.assertIn(wanted[1:], str(error))

    @needs_root
    @needs_programs("knockd", "unshare", "stdbuf", "ip")
    def test_lines_of_knockd(self) -> None:
        """knockd does with each of them what the table says, and reads the same values."""
        for lines, wanted, ours in KNOCKD_LINES:
            with self.subTest(lines):
                path = self.write_lines(lines)
                with subprocess.Popen(
                        ["unshare", "-n", "sh", "-c", "ip link set lo up; exec stdbuf -oL knockd "
                         "-D -v -i lo -c " + path], stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT, encoding="latin-1") as process:
                    assert process.stdout
                    said: List[str] = []
                    while "listening on lo" not in "".join(said[-1:]):
                        said.append(process.stdout.readline())
                        if not said[-1]:
                            break
                    process.terminate()
                self.assertEqual(wanted, TAKEN if said[-1] else REFUSED, said)
                if wanted == TAKEN and not ours:
                    self.assertEqual([], [line for line in self.values(lines)
                                          if line + "\n" not in said], said)

    def test_seq_cooldown(self) -> None:
        """After it has opened, a door ignores everybody for that long; a reload keeps that."""
        knockd = ("[a]\nSequence = 7000,8000\nSeq_CoolDown = 60 # s\n"
                  "[b]\nSequence = 9000\n")
        made = self.serve_for(knockd=knockd)
        self.assertIn("a: OPEN SESAME", self.hit(7000, 8000))
        for source in ("10.55.0.2", "10.55.0.3"):
            self.assertNotIn("a: ", self.hit(7000, 8000, source=source))
        self.assertIn("b: OPEN SESAME", self.hit(9000))
        self.assertIn("b: OPEN SESAME", self.hit(9000))
        made.knocks.configure(made.configuration)
        self.assertNotIn("a: ", self.hit(7000, 8000))
        self.clock.pass_seconds(60)
        self.assertIn("a: OPEN SESAME", self.hit(7000, 8000))

    def test_scans(self) -> None:
        """One line says which doors a scan opens, and which line prevents it."""
        path = os.path.join(self.directory, "knockd.conf")
        with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            file.write("[open]\nSequence = 7000,8000,9000\n[close]\nSequence = 9000,8000,7000\n"
                       "[one]\nSequence = 25565\n")
        self.assertEqual(
            ["[open][close] a scan of all ports opens it: let its ports rise and fall, or make it "
             "strict (knockd.conf: the line `Strict` below [options])",
             "[one] one port is no secret: a scan of all ports opens it"],
            server.read_knockd(path).warnings)


    @needs_root
    @needs_programs("knockd", "knock", "unshare", "ip")
    def test_surroundings_of_commands(self) -> None:
        """A command has the environment and directory that the server was started with."""
        path = self.write_lines("[options]\nInterface = lo\nPidFile = HERE/pid\n[a]\nSequence = "
                                "7000:udp\nCommand = (pwd; umask; env | sort) >new; mv new out\n")
        ours = os.path.join(self.directory, "knockd")
        os.symlink(compiled(os.path.abspath(server.__file__)), ours)
        script = ('ip link set lo up; "$@" -c knockd.conf & while ! [ -e out ]; do '
                  "knock -u 127.0.0.1 7000; sleep 0.1; done; kill $!; wait $!; cat out; rm out")
        surroundings = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "TOKEN": "a b", "LC_ALL": "C"}
        said = [run(["unshare", "-n", "sh", "-c", script, "sh", *command], env=surroundings,
                    cwd=os.path.dirname(path)).stdout.split(self.directory + "\n", 1)[-1]
                for command in (["knockd"], [sys.executable, ours])]
        self.assertIn("TOKEN=a b\n", said[0])
        self.assertEqual(*said)

    def test_no_path_to_the_current_directory(self) -> None:
        """There another user could have put a program that root's shell would run."""
        for path, wanted in ((".:/usr/bin::/bin:x", b"/usr/bin:/bin\n"),
                             (":", server.COMMAND_ENVIRONMENT["PATH"].encode() + b"\n")):
            with mock.patch.dict(os.environ, PATH=path):
                child = server.launch(server.Command((b"/bin/sh", b"-c", b"echo $PATH"), None,
                                                     inherits=True), subprocess.PIPE)
            self.assertEqual(wanted, child.communicate()[0])


class LifeTest(ConfigCase):
    """Files that scripts look at."""

    def test_pid_and_grants(self) -> None:
        """The pid stays after a stop; `grants` is beside the pid file, whose directory is made."""
        path, log = self.place("x/d.pid"), server.Log()
        os.close(server.lock_pid_file(path, log))
        with open(path) as file:
            self.assertEqual(f"{os.getpid()}\n", file.read())
        found = self.settings_of("-c", self.write(FWKNOPD, ""), "-p", path)
        self.assertEqual(self.place("x/grants"), server.openers_file(found))
