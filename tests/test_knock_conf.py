"""How knocking is configured: sequences, knockd.conf, stanzas, and the name knockd.

Where knockd is installed, each row of the grammar is shown to it as well.
"""

import io
import ipaddress
import os
import sys
from typing import Any, List, Tuple
from unittest import mock

import spa_server as server
from tests.support import TOP, needs_programs, run
from tests.test_config import KEYED, ConfigCase

TCP, UDP, ICMP, ANY = server.TCP, server.UDP, server.ICMP, server.ANY_SIZE
PORTS = ",".join(map(str, range(7001, 7034)))  # 33, one too many

STEPS = (
    ("7000", ((TCP, 7000),)), ("1,65535", ((TCP, 1), (TCP, 65535))),
    ("7000,8000:udp,9000:tcp", ((TCP, 7000), (UDP, 8000), (TCP, 9000))),
    (" 7000 :\tUDP ,8000 : Tcp\t", ((UDP, 7000), (TCP, 8000))),
    ("7000,7000", ((TCP, 7000), (TCP, 7000))), ("07000", ((TCP, 7000),)),
    ("7000,8000 # comment", ((TCP, 7000), (TCP, 8000))), ("7000,8000;", ((TCP, 7000), (TCP, 8000))),
    ("7000 ; comment", ((TCP, 7000),)), ("7000#", ((TCP, 7000),)),
    (":icmp, 0:icmp,100:ICMP,1452:icmp", ((ICMP, ANY), (ICMP, 0), (ICMP, 100), (ICMP, 1452))),
    (PORTS[:-5], tuple((TCP, port) for port in range(7001, 7033))),
)
BAD_STEPS = ("", ",", "7000,", ",7000", "7000,,8000", "0", "65536", "70000", "-1", "++1", "1.5",
             "x", "ssh", "7000:", "7000:sctp", "7000:udp:x", "7000:ud p", "7000;8000", "7000 8000",
             ":tcp", ":udp", "1453:icmp", "65507:icmp", "-1:icmp", "x:icmp", "\xb2", "\xb2:icmp",
             "000001", "7000\0", PORTS, "# 7000", "tcp/7000", "7000#9000", "7000//9000",
             "7000(9000)", "7000 # a,9000")
FLAGS = (("", (0, 0)), ("syn", (2, 2)), ("SYN,!Ack", (18, 2)), ("!syn", (2, 0)),
         ("fin,syn,rst,psh,ack,urg", (63, 63)), ("syn,!syn", (2, 0)), ("!syn,syn", (2, 2)))
BAD_FLAGS = ("syn, ack", " syn", "! syn", "syn|ack", "ece", "cwr", "!", "!!syn", "syn,", ",", "x",
             "syn ack", "0x2")


class ParserTest(ConfigCase):
    """The parsers that both kinds of files share."""

    def test_steps(self) -> None:
        """A list of steps has up to 32 ports with protocols, ICMP, blanks and comments."""
        for text, steps in STEPS:
            with self.subTest(text=text):
                self.assertEqual(steps, server.parse_steps(text))

    def test_bad_steps(self) -> None:
        """The error says what is expected, and never the text: it may be most of a sequence."""
        for text in BAD_STEPS:
            with self.subTest(text=text):
                with self.assertRaises(ValueError) as caught:
                    server.parse_steps(text)
                self.assertIn(str(caught.exception), (
                    "expected ports such as `7000, 8000:udp, 100:icmp`, without quotes",
                    "expected at most 32 ports",
                    "expected no comma in the comment: fwknopd and knockd read on behind it",
                    "expected a blank before a comment's #, ;, // or ("))

    def test_flags(self) -> None:
        """Flags are set or clear, in any case; the last of two wins; there may be none."""
        for text, flags in FLAGS:
            self.assertEqual(flags, server.parse_flags(text), text)
        for text in BAD_FLAGS:
            with self.assertRaisesRegex(ValueError, "^expected fin, syn, rst", msg=text):
                server.parse_flags(text)


# ------------------------------------------------------------------- knockd.conf

DOOR = "[d]\nSequence = 7000\n"
# (text, what our error says behind `knockd.conf:`, or None; whether knockd takes it)
GRAMMAR = (
    ("", None, True), ("# only\n\n  # comments\n", None, True), ("[options]\n", None, True),
    (DOOR, None, True), (DOOR.replace("\n", "\r\n"), None, True),
    ("  [d]\t\n sequence=7000", None, True),
    ("[a b = c # d]\nSEQUENCE = 7000\n", None, True),
    ("[d\n", "1: expected a section: its name", False),
    ("[d]] \nSequence = 1\n", None, True), ("[]\n", "1: expected a section: its name", False),
    ("[d] x\nSequence = 1\n", "1: expected a section: its name", False),
    ("\xef\xbb\xbf[d]\nSequence = 1\n", None, False),
    ("Sequence = 1\n", "1: Sequence: expected a section first", False),
    ("; x\n", "1: expected a section first", False),
    (DOOR + "; x\n", "3: expected `name = value`", False),
    ("[options]\nLogFile = /x\n" + DOOR, None, True),
    ("[Options]\nLogFile = /x\n", "2: LogFile: expected in the section [options]", False),
    (DOOR + "LogFile = /x\n", "3: LogFile: expected in the section [options]", False),
    ("[options]\nSequence = 7000\n", "2: Sequence: unknown directive", False),
    ("[options]\nUseSyslog\n", None, True), (DOOR + " usesyslog \n", None, True),
    (DOOR + "UseSyslog = 1\n", "3: UseSyslog: expected UseSyslog alone", False),
    (DOOR + "UseSyslog =\n", "3: UseSyslog: expected UseSyslog alone", False),
    ("UseSyslog\n", "1: UseSyslog: expected UseSyslog alone", False),
    ("[options]\nStrict\nStrictDuplicates\n", None, False),  # these are ours
    ("[d]\n", "1: expected Sequence or One_Time_Sequences", False),
    ("\n[d]\nStart_Command = x\n", "2: expected Sequence or One_Time_Sequences", False),
    (DOOR + "Sequence = 8000\n" + DOOR, None, True),
    (DOOR + "unknown = 1\n", "3: unknown: unknown", False),
    (DOOR + "Seq_Timeout\n", "3: Seq_Timeout: expected `name = value`", False),
    (DOOR + "Start_Command\n", "3: Start_Command: expected `name = value`", False),
    (DOOR + "Start_Command =\n", None, True), (DOOR + "Stop_Command_6=\n", None, True),
    (DOOR + "Command = a = b; c # d\n", None, True), (DOOR + "TCPFlags = syn,!ack\n", None, True),
    (DOOR + "TCPFlags = syn, ack\n", "3: TCPFlags: expected fin, syn, rst", False),
    (DOOR + "TCPFlags =\n", "3: TCPFlags: expected `name = value`", False),
    (DOOR + "Seq_Cooldown = 60 # x\n", None, False),  # a fork's
    (DOOR + "timeout = 5 # x\n", None, True), (DOOR + "Cmd_Timeout = 0\n", None, True),
    (DOOR + "Seq_Timeout = 15;\n", None, True), (DOOR + "Cmd_Timeout = 10 sec\n", None, True),
    ("[d]\nSequence = 7000,8000 ; x\n", None, True),
    ("[d]\nSequence = 7000,70000\n", "2: Sequence: expected ports such as", False),
    ("[d]\nSequence = 7000:sctp\n", "2: Sequence: expected ports such as", False),
    ("[d]\nSequence = %s\n" % PORTS, "2: Sequence: expected at most 32", False),
    (DOOR + "Target = fd55::1\n", None, True), ("[options]\nInterface = eth0\n" + DOOR, None, True),
    # knockd takes these, and then does something else than it says
    ("[d]\nSequence = abc\n", "2: Sequence: expected ports such as", True),
    ("[d]\nSequence = 7000,-1\n", "2: Sequence: expected ports such as", True),
    ("[d]\nSequence = 7000,\n", "2: Sequence: expected ports such as", True),
    ("[d]\nSequence = 7000:udp:x\n", "2: Sequence: expected ports such as", True),
    ("[d]\nSequence = 7000;8000\n", "2: Sequence: expected a blank before a comment's #, ;,", True),
    (DOOR + "Cmd_Timeout = 1h\n", "3: Cmd_Timeout: expected seconds, 0 to 8388608", True),
    (DOOR + "Seq_Timeout = 0\n", "3: Seq_Timeout: expected seconds, 1 to 8388608", True),
    (DOOR + "Seq_Timeout = soon\n", "3: Seq_Timeout: expected seconds, 1 to 8388608", True),
    (DOOR + "Cmd_Timeout = -1\n", "3: Cmd_Timeout: expected seconds, 0 to 8388608", True),
    (DOOR + "Target = host\n",
     "3: Target: expected an IP address, without leading zeros or scope, not 'host'", True),
    (DOOR + "Target =\n", "3: Target: expected `name = value`", True),
    (DOOR + "One_Time_Sequences =\n", "3: One_Time_Sequences: expected `name = value`", False),
    ("[options]\nInterface = a b\n", "2: Interface: expected", True),
    ("[options]\nLogFile =\n", "2: LogFile: expected `name = value`", True),
    ("[d]\nSequence = 7000 \0\n", "2: Sequence: expected `name = value`", True),
    (DOOR + "Command = %s\n" % ("x" * 4000 + "%IP%" * 5), "3: Command: expected at most", True),
)


class KnockdConfTest(ConfigCase):
    """The whole grammar of tests/spec/knockd.md 1.2."""

    def read(self, text: str) -> Any:
        """Return a knockd.conf with this text."""
        return server.read_knockd(self.write("knockd.conf", text))

    def door(self, lines: str) -> Any:
        """Return a door with these lines."""
        return self.read("[d]\n" + lines).doors[0]

    def test_grammar(self) -> None:
        """Each text is read, or its error names the line; no error shows a sequence."""
        for text, expected, _ in GRAMMAR:
            with self.subTest(text=text):
                if expected is None:
                    self.read(text)
                    continue
                with self.assertRaises(server.ConfigError) as caught:
                    self.read(text)
                said = str(caught.exception).replace(self.directory + "/", "")
                self.assertTrue(said.startswith("knockd.conf:" + expected), said)
                self.assertNotIn("7000,", said.replace("`7000, 8000:udp, 100:icmp`", ""))

    @needs_programs("knockd")
    def test_the_knockd_of_this_machine(self) -> None:
        """knockd reads the texts of the table: then only the interface is missing."""
        for text, _, taken in GRAMMAR:
            with self.subTest(text=text):
                path = self.write("knockd.conf", text)
                said = run(["knockd", "-c", path, "-i", "no-such-link0"]).stderr
                self.assertIs(taken, "could not open no-such-link0" in said, said)

    def test_values(self) -> None:
        """Every directive has its default, its aliases and its value."""
        door = self.door("Sequence = 7000")
        self.assertEqual((25, (0, 0), 10, None, [""] * 2), (
            door.knock_seconds, door.knock_flags, door.stop_seconds, door.target,
            door.commands(ipaddress.ip_address("10.0.0.1"))))
        door = self.door("sequence = 1,2\nSEQ_TIMEOUT=9\nCommand = a\nCommand_6=b\n"
                         "Cmd_Timeout=7#x\nStop_Command= c\nStop_Command_6 = d\n"
                         "Target = ::ffff:10.0.0.9\ntcpflags = syn,ack\n"
                         "TCPFlags = !ack,fin\ntimeout = 8")
        self.assertEqual((8, (19, 3), 7, b"\x0a\0\0\x09"), (
            door.knock_seconds, door.knock_flags, door.stop_seconds, door.target))
        self.assertEqual((((TCP, 1), (TCP, 2)), 8, (19, 3), False, False, door.target), (
            door.sequence.steps, door.sequence.seconds, door.sequence.flags, door.sequence.strict,
            door.sequence.exact, door.sequence.target))

    def test_options(self) -> None:
        """Options hold for all doors, wherever their section is; interfaces are some, or any."""
        made = self.read(DOOR + "[options]\nstrict\nSTRICTDUPLICATES\nusesyslog\nPidFile = /p\n"
                         "LogFile = /l\nInterface = eth0, eth1 ,eth0\n")
        options, sequence = made.options, made.doors[0].sequence
        self.assertEqual((True, "/p", "/l", ("eth0", "eth1")), (
            options.use_syslog, options.pid_file, options.log_file, options.interfaces))
        self.assertEqual((True, True), (sequence.strict, sequence.exact))
        options = self.read("[options]\nInterface = eth0,any\n").options
        self.assertEqual((False, "/var/run/knockd.pid", None, ("any",)), (
            options.use_syslog, options.pid_file, options.log_file, options.interfaces))

    def test_doors(self) -> None:
        """Two sections of one name are two doors; the last of two lines wins."""
        made = self.read(DOOR + "Sequence = 8000\n" + DOOR)
        self.assertEqual([("d", -1, ((TCP, 8000),)), ("d", -2, ((TCP, 7000),))],
                         [(door.name, door.number, door.sequence.steps) for door in made.doors])
        self.assertEqual([], self.read("").doors)

    def test_commands(self) -> None:
        """%IP% is replaced in both families; commands may be empty; no start means no stop."""
        four, six = ipaddress.ip_address("10.0.0.1"), ipaddress.ip_address("fd55::1")
        base = "Sequence = 1\n"
        for lines, for4, for6 in (
                ("Start_Command = a %IP%%IP% %ip% %PORT%\nStop_Command = z %IP%",
                 ["a 10.0.0.110.0.0.1 %ip% %PORT%", "z 10.0.0.1"],
                 ["a fd55::1fd55::1 %ip% %PORT%", "z fd55::1"]),
                ("Command = a\nCommand_6 = b %IP%\nStop_Command = c\nStop_Command_6 = d",
                 ["a", "c"], ["b fd55::1", "d"]),
                ("Command = a\nCommand_6 =\nStop_Command = c", ["a", "c"], ["", ""]),
                ("Command = a\nStop_Command = c\nStop_Command_6 =", ["a", "c"], ["a", ""]),
                ("Command =\nCommand_6 = b\nStop_Command = c", ["", ""], ["b", "c"]),
                ("Stop_Command = c", ["", ""], ["", ""])):
            with self.subTest(lines=lines):
                door = self.door(base + lines)
                self.assertEqual((for4, for6), (door.commands(four), door.commands(six)))

    def test_length_of_commands(self) -> None:
        """A command has at most 4095 bytes with the longest address in it."""
        longest = "x" * (4095 - 39) + "%IP%"
        door = self.door("Sequence = 1\nCommand = " + longest)
        self.assertEqual(4095 - 39 + 8, len(door.commands(ipaddress.ip_address("10.0.0.1"))[0]))
        with self.assertRaises(server.ConfigError):
            self.door("Sequence = 1\nCommand = x" + longest)

    def test_dump(self) -> None:
        """The dump parses back, and shows no sequence."""
        text = ("[options]\n\tUseSyslog\n\tLogFile = /l\n\tInterface = eth0, any\n\tStrict\n"
                "[a b]\n\tSequence = HIDDEN\n\tSeq_Timeout = 9\n\tTCPFlags = syn,!ack\n"
                "\tStart_Command = a = %IP% # b\n\tStop_Command_6 = \n"
                "[c]\n\tSequence = HIDDEN")
        given = (text.replace("HIDDEN", "7000,8000:udp").replace("TCPFlags = syn,!ack",
                 "TCPFlags = syn\nTCPFlags = !ack").replace("Seq_Timeout", "timeout")
                 .replace("Start_Command ", "COMMAND "))
        made = self.read(given)
        text = text.replace("HIDDEN", "<see the knockd.conf file>")
        self.assertEqual(text, "\n".join(made.dump()))
        again = self.read("\n".join(made.dump()).replace("<see the knockd.conf file>",
                                                        "7000,8000:udp"))
        self.assertEqual(text, "\n".join(again.dump()))
        self.assertEqual([door.texts for door in made.doors], [door.texts for door in again.doors])

    def test_warnings(self) -> None:
        """A file that others can read is warned of, and a sequence that a scan opens."""
        path = self.write("knockd.conf", DOOR, 0o644)
        said = server.read_knockd(path).warnings
        self.assertIn("permissions should only be user read/write", said[0])
        self.assertIn("[d] one port is no secret", said[1])
        scanned = "a scan of all ports opens it"
        for options, steps, warned in (
                ("", "7000,8000,9000", True), ("Strict", "7000,8000,9000", False),
                ("Strict", "7000,7001,7002", True), ("Strict", "9,8,7", True), ("", "3,2,1", True),
                ("", "7000,9000,8000", False), ("", "7000,8000:udp", False), ("Strict", "7", True),
                ("", "7000,7000", False), ("Strict", ":icmp", True), ("", "1,2,2", False)):
            with self.subTest(options=options, steps=steps):
                made = self.read("[options]\n%s\n[d]\nSequence = %s\n" % (options, steps))
                self.assertIs(warned, scanned in "".join(made.warnings))

    def test_files_that_can_not_be_read(self) -> None:
        """The error names the file and the reason."""
        for path in ("/no/such/knockd.conf", self.directory):
            with self.assertRaisesRegex(server.ConfigError, "^%s: " % path):
                server.read_knockd(path)


# ------------------------------------------------------------------- stanzas

KEYLESS = "SOURCE ANY\nOPEN_PORTS tcp/22\n"
KNOCK = "KNOCK_SEQUENCE 7000,9000,8000\n"
# (lines, what the error says behind `access.conf:`)
REFUSED = (
    ("SOURCE ANY\n" + KNOCK, "2: KNOCK_SEQUENCE: expected OPEN_PORTS with it"),
    (KEYED + KNOCK, "4: KNOCK_SEQUENCE: expected OPEN_PORTS with it"),
    (KEYLESS, "1: SOURCE: expected a KEY or KEY_BASE64 in this stanza, or GPG_DECRYPT_ID, "
     "OPENSPA_CLIENTS or KNOCK_SEQUENCE"),
    (KEYLESS + KNOCK + "HMAC_KEY x\n", "1: SOURCE: expected a KEY"),
    (KEYLESS + KNOCK + "KNOCK_ONE_TIME_FILE /x\n", "4: KNOCK_ONE_TIME_FILE: expected only one of "
     "KNOCK_SEQUENCE and KNOCK_ONE_TIME_FILE"),
    (KEYLESS + KNOCK + "REQUIRE_KNOCK Y\n", "4: REQUIRE_KNOCK: expected a KEY as well"),
    (KEYLESS + KNOCK + "REQUIRE_USERNAME bob\n", "4: REQUIRE_USERNAME: expected REQUIRE_KNOCK Y"),
    (KEYED + "OPEN_PORTS tcp/22\n" + KNOCK + "REQUIRE_USERNAME bob\n", "6: REQUIRE_USERNAME: "
     "expected REQUIRE_KNOCK Y"),
    (KEYLESS + KNOCK + "FW_ACCESS_TIMEOUT 0\n", "4: FW_ACCESS_TIMEOUT: expected more than 0"),
    (KEYLESS + KNOCK + "RESTRICT_PORTS udp/1,tcp/22\n", "4: RESTRICT_PORTS: expected none of"),
    (KEYLESS + "KNOCK_ONE_TIME_FILE /no/such\n", "3: KNOCK_ONE_TIME_FILE: /no/such: No such"),
    (KEYLESS + KNOCK + "CMD_CYCLE_OPEN /bin/sh\n", "4: CMD_CYCLE_OPEN: expected CMD_CYCLE_CLOSE"),
    (KEYLESS + KNOCK + "FORCE_NAT 10.0.0.1 22\n", "4: FORCE_NAT: requires either"),
) + tuple((KEYED + line + "\n", "4: %s: expected KNOCK_SEQUENCE with it" % line.split()[0])
          for line in ("KNOCK_TIMEOUT 5", "KNOCK_TCPFLAGS syn", "KNOCK_STRICT N",
                       "KNOCK_STRICT_DUPLICATES Y", "REQUIRE_KNOCK Y", "REQUIRE_KNOCK N"))
TAKEN = (
    KEYLESS + KNOCK, KEYED + "OPEN_PORTS tcp/22\n" + KNOCK, KEYED + KNOCK + "REQUIRE_KNOCK Y\n",
    KEYED + KNOCK + "REQUIRE_KNOCK Y\nREQUIRE_USERNAME bob\nFW_ACCESS_TIMEOUT 0\n"
    "OPEN_PORTS tcp/22\nRESTRICT_PORTS tcp/22\n",
    KEYLESS + KNOCK + "REQUIRE_SOURCE Y\nRESTRICT_PORTS tcp/25\nACCESS_EXPIRE 01/02/2090\n",
    KEYLESS + KNOCK + "FW_ACCESS_TIMEOUT 0\nCMD_CYCLE_OPEN /bin/sh\nCMD_CYCLE_CLOSE /bin/sh x\n"
    "CMD_CYCLE_TIMER 5\n",
    KEYLESS + KNOCK + "ENCRYPTION_MODE Asymmetric\n",
)


class KnockStanzaTest(ConfigCase):
    """KNOCK_SEQUENCE and its directives in access.conf."""

    def warned(self, text: str) -> str:
        """Return the warnings of an access.conf."""
        return "\n".join(server.read_stanzas(self.write("access.conf", text))[1])

    def test_refused(self) -> None:
        """Each error has file, line and name, and not the sequence."""
        for text, expected in REFUSED:
            with self.subTest(text=text):
                if "FORCE_NAT" in text:
                    with self.assertRaises(server.ConfigError) as caught:
                        server.check_nat(self.settings(""), self.stanzas(text))
                    said = str(caught.exception).replace(self.directory + "/", "")
                else:
                    said = self.error_of(text)
                self.assertTrue(said.startswith("access.conf:" + expected), said)
                self.assertNotIn("9000", said)

    def test_taken(self) -> None:
        """The stanza has the sequence of its lines."""
        for text in TAKEN:
            with self.subTest(text=text):
                stanza = self.stanzas(text)[0]
                self.assertEqual(((TCP, 7000), (TCP, 9000), (TCP, 8000)), stanza.sequence.steps)
                self.assertIs(text.startswith(KEYED), stanza.takes_packets)

    def test_defaults(self) -> None:
        """A sequence is strict, has 25 seconds, and counts SYNs; each can be changed."""
        for lines, expected in (
                ("", (25, (18, 2), True, False)),
                ("KNOCK_TIMEOUT 7\nKNOCK_TCPFLAGS fin\nKNOCK_STRICT N\nKNOCK_STRICT_DUPLICATES Y\n",
                 (7, (1, 1), False, True))):
            sequence = self.stanzas(KEYLESS + KNOCK + lines)[0].sequence
            self.assertEqual(expected, (sequence.seconds, sequence.flags, sequence.strict,
                                        sequence.exact))

    def test_warnings(self) -> None:
        """A sequence that a scan opens is warned of; nothing that only packets have is."""
        said = self.warned(KEYLESS + KNOCK)
        self.assertNotIn("REQUIRE_SOURCE", said)
        self.assertNotIn("HMAC", said)
        self.assertNotIn("scan", said)
        for steps, strict, warned in (("7000", "Y", True), ("1,2,3", "Y", True),
                                      ("1,5,9", "Y", False), ("1,5,9", "N", True)):
            text = KEYLESS + "KNOCK_SEQUENCE %s\nKNOCK_STRICT %s\n" % (steps, strict)
            self.assertIs(warned, "a scan of all ports opens it" in self.warned(text), text)

    def test_no_sequence_is_shown(self) -> None:
        """No dump, error or repr shows a sequence."""
        path = self.write("knockd.conf", "[d]\nSequence = 17000,19000\n")
        text = KEYLESS + "KNOCK_SEQUENCE 17000, 19000\n"
        code, out, err = self.main_with(text, "PCAP_INTF lo;\nKNOCKD_CONF %s;\n" % path, "-D")
        self.assertEqual(0, code, err)
        self.assertIn("KNOCK_SEQUENCE:  <see the access.conf file>", out)
        self.assertIn("[options]\n[d]\n\tSequence = <see the knockd.conf file>\n", out)
        bad = self.error_of(text.replace("17000,", "17000;"))
        stanza = self.stanzas(text)[0]
        for shown in (out, err, bad, self.error_of(text.replace("19000", "19000:x")),
                      repr(stanza), repr(stanza.sequence), self.warned(text)):
            self.assertNotIn("17000", shown)

    def test_a_key_file_can_not_name_a_sequence(self) -> None:
        """A user may own the key file; a spoilt one leaves no sequence that opens."""
        keys = self.write("keys", "KEY k3y\nKNOCK_SEQUENCE 1,2\n")
        text = "SOURCE ANY\nOPEN_PORTS tcp/22\n%%include_keys %s\n" % keys
        stanza = self.stanzas(text + KNOCK)[0]
        self.assertIn("expected only keys here", stanza.void)
        self.assertIsNone(stanza.sequence)


# ------------------------------------------------------------------- the command line

class NameTest(ConfigCase):
    """spa_server.py under the name knockd, and --knockd-conf."""

    def knockd(self, *words: str) -> Tuple[Any, str, str]:
        """Run the program through the name knockd; return code, output and errors."""
        with mock.patch.object(sys, "argv", ["/usr/sbin/knockd", *words]):
            return self.main(*words)

    def configuration(self, words: List[str], program: str = "knockd") -> Any:
        """Return the configuration of a command line."""
        return server.read_configuration(server.Arguments(words, program), "/start")

    def test_help_and_version(self) -> None:
        """Every option of knockd works, and none of fwknopd."""
        code, out, err = self.knockd("-h")
        self.assertEqual((0, ""), (code, err))
        self.assertIn("Usage: knockd", out)
        for letter, name in zip("idcDlpgv4Vh", (
                "interface daemon config debug lookup pidfile logfile verbose only-ip-v4 version "
                "help").split()):
            self.assertRegex(out, "-%s, --%s\\b" % (letter, name))
        self.assertNotIn("fw-list", out)
        self.assertEqual(self.main("-V"), self.knockd("-V"))

    def test_symlink(self) -> None:
        """The name of the program decides."""
        path = os.path.join(self.directory, "knockd")
        os.symlink(os.path.join(TOP, "spa_server.py"), path)
        self.assertIn("Usage: knockd", run([sys.executable, path, "--help"]).stdout)
        answer = run([sys.executable, path, "-c", "/no/such/knockd.conf"])
        self.assertEqual(3, answer.returncode)
        self.assertIn("/no/such/knockd.conf: No such file or directory", answer.stderr)

    def test_errors(self) -> None:
        """A wrong command line exits with 2, a wrong file with 3."""
        good, bad = self.write("good", DOOR), self.write("bad", DOOR + "x = 1\n")
        for words, code, said in (
                (["--fw-list"], 2, "--fw-list"), (["-f"], 2, "-- 'f'"), (["x"], 2, "'x'"),
                (["-c"], 2, "-c"), (["-c", bad], 3, "bad:3: x: unknown directive"),
                (["-c", "/no/such/file"], 3, "/no/such/file: No such file"),
                (["-c", good, "-i", "a b"], 2, "--interface: expected")):
            with self.subTest(words=words):
                got, out, err = self.knockd(*words)
                self.assertEqual((code, ""), (got, out), err)
                self.assertIn(said, err)

    def test_files_and_options(self) -> None:
        """-i wins over the file; PidFile and LogFile win over -p and -g, as in knockd."""
        plain = self.write("plain", DOOR)
        full = self.write("full", DOOR + "[options]\nInterface = eth0\nPidFile = /f/pid\n"
                          "LogFile = /f/log\n")
        for path, words, expected in (
                (plain, [], (("any",), "/var/run/knockd.pid", None)),
                (plain, ["-i", "eth1,eth2", "-p", "/o/pid", "-g", "/o/log"],
                 (("eth1", "eth2"), "/o/pid", "/o/log")),
                (full, [], (("eth0",), "/f/pid", "/f/log")),
                (full, ["-i", "eth1", "-p", "/o/pid", "-g", "/o/log"],
                 (("eth1",), "/f/pid", "/f/log"))):
            with self.subTest(path=path, words=words):
                made = self.configuration(["-c", path] + words)
                self.assertEqual(expected, (made.knockd.options.interfaces, made.settings.pid_file,
                                            made.knockd.options.log_file))
        relative = self.write("relative", DOOR + "[options]\nPidFile = run/pid\n")
        self.assertEqual("/start/run/pid", self.configuration(["-c", relative]).settings.pid_file)

    def test_words(self) -> None:
        """-4, -l, -D and -v have their effect; the log has knockd's lines."""
        path = self.write("knockd.conf", DOOR + "[options]\nInterface = eth0,eth1\n")
        made = self.configuration(["-4", "-l", "-D", "-v", "-d", "-c", path])
        self.assertEqual((True, True, []), (made.four_only, bool(made.settings.verbose),
                                            made.stanzas))
        self.assertEqual((("eth0", "eth1"), path), (made.knockd.options.interfaces,
                                                    made.settings.knockd_file))
        self.assertEqual("shutting down", made.words("Shutting Down fwknopd.", "shutting down"))
        self.assertEqual(["/etc/knockd.conf"], [line.value for line in server.Arguments(
            [], "knockd").lines])

    def test_beside_stanzas(self) -> None:
        """--knockd-conf and KNOCKD_CONF serve a knockd.conf alone, or beside access.conf."""
        doors = self.write("knockd.conf", DOOR)
        conf = "FWKNOP_CONF_DIR %s;\n" % self.directory
        named = ["-c", self.write("fwknopd.conf", conf), "--knockd-conf", doors]
        alone = self.configuration(named, "fwknopd")
        self.assertEqual((0, 1, "knockd"), (len(alone.stanzas), len(alone.knockd.doors),
                                            alone.words("fwknopd", "knockd")))
        self.write("access.conf", KEYED)
        self.write("fwknopd.conf", conf + "KNOCKD_CONF %s;\n" % doors)
        for words in (named, named[:2]):
            both = self.configuration(words, "spa_server.py")
            self.assertEqual((1, 1, "fwknopd"), (len(both.stanzas), len(both.knockd.doors),
                                                 both.words("fwknopd", "knockd")))
            self.assertEqual([("any",)], [names for names, _ in both.listenings()])
        with self.assertRaisesRegex(server.ConfigError, "/no/such"):  # named, so it must be there
            self.configuration(named + ["-a", "/no/such/access.conf"], "fwknopd")

    def test_dump_and_check(self) -> None:
        """-D and --exit-parse-config work with a knockd.conf alone."""
        doors, conf = self.write("knockd.conf", DOOR), self.write(
            "fwknopd.conf", "FWKNOP_CONF_DIR %s;\n" % self.directory)
        code, out, err = self.main("-c", conf, "--knockd-conf", doors, "-D")
        self.assertEqual(0, code, err)
        self.assertIn("Current knockd.conf settings:\n[options]\n[d]\n"
                      "\tSequence = <see the knockd.conf file>\n", out)
        code, out, err = self.main("-c", conf, "--knockd-conf", doors, "--exit-parse-config")
        self.assertEqual((0, "Configs parsed, exiting.\n"), (code, out), err)
        self.assertEqual(3, self.main("-c", conf, "--knockd-conf", self.write("bad", "x"), "-D")[0])

    def test_log_file(self) -> None:
        """Lines have knockd's date; a file that can't be written is told, and no reason to stop."""
        path = os.path.join(self.directory, "log")
        stream = io.StringIO()
        log = server.Log()
        log.open_stream(stream)
        options = server.KnockdOptions()
        options.set_defaults()
        for name in ("log", "no/such/log"):
            options.log_file = name
            server.direct_log(log, options, self.directory)
            log.info("10.0.0.1: d\xe9: Stage 1")
        with open(path) as file:
            self.assertRegex(file.read(), r"\A\[\d{4}-\d\d-\d\d \d\d:\d\d\] "
                             r"10.0.0.1: d\\xe9: Stage 1\n\Z")
        self.assertIn("no/such/log: No such file or directory; it gets no lines\n",
                      stream.getvalue())
