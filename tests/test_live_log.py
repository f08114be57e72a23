"""What fwknop's users and its own test suite look for in output: a row is shown to both programs.

Each row is an input and patterns. All of them have to be in what the real fwknopd or fwknop prints
(2.6.10), and in what ours prints, in this order. tests/test_log.py has single lines; the server
writes them without the real one there.
"""

import os
import re
import time
import unittest
from typing import Any, Callable, List, NamedTuple, Tuple

from tests.netns import (CLIENT4, FWKNOP, HMAC_KEY, INNER4, KEY, KEYS, SERVER4, SPA_CLIENT,
                         SPA_SERVER, STANZA, Cable, Gateway, Server, in_parallel)
from tests.support import needs_programs, needs_root, wait_for, write
from tests.test_packet import Sender, b64

MATCH = r"\(stanza #%d\) SPA Packet from IP: 10\.55\.0\.2 received with access source match$"
INVALID = r"\[10\.55\.0\.2\] \(stanza #1\) Error creating fko context: Args contain invalid data"
ADDED = r"^Added %s rule to %s for 10\.55\.0\.2 -> 0\.0\.0\.0/0 tcp/%%d, expires at \d+$"
RULE = r"'-t %s -m comment --comment _exp_\d+ -j %s' added to %s$"
MASK = "SOURCE ANY\nDESTINATION 192.0.2.1\nKEY testkey\nHMAC_KEY hmackey\n"
NO_HMAC = "SOURCE ANY\nKEY %s\n"
SENDER = Sender(b"testkey", b"hmackey")


def packet(**fields: Any) -> str:
    """Return a packet of now with these fields."""
    fields.setdefault("text", CLIENT4 + ",tcp/22")
    return SENDER.packet(timestamp=int(time.time()), **fields).decode()


class Life(NamedTuple):
    """A server's files and options, what it hears, and the lines that come of each."""

    name: str
    config: str
    access: str
    begin: Tuple[str, ...]  # patterns of its start
    steps: Tuple[Tuple[Any, Tuple[str, ...]], ...]  # options of fwknop or a function; patterns
    listed: Tuple[str, ...] = ()  # patterns of --fw-list after that
    options: Tuple[str, ...] = ()
    absent: str = "$."  # a pattern that no line has


# Names and order of the fields, as with the client's -v.
FIELDS = (
    r"^SPA Packet: '\S+'$", r"^\[10\.55\.0\.2\] \(stanza #1\) SPA Decode \(res=0\):$",
    "^SPA Field Values:$", "^=================$", r"^   Random Value: \d{16}$",
    "^       Username: bob$", r"^      Timestamp: \d+$", r"^    FKO Version: 3\.0\.0$",
    r"^   Message Type: 1 \(Access msg\)$", r"^ Message String: 10\.55\.0\.2,tcp/22$",
    "^     Nat Access: <NULL>$", "^    Server Auth: <NULL>$", "^ Client Timeout: 0$",
    r"^    Digest Type: 3 \(SHA256\)$", r"^      HMAC Type: 3 \(SHA256\)$",
    r"^Encryption Type: 1 \(Rijndael\)$", r"^Encryption Mode: 2 \(CBC\)$",
    r"^   Encoded Data: \d{16}:Ym9i:\d+:3\.0\.0:1:\w+$", r"^SPA Data Digest: \S{43}$",
    r"^           HMAC: \S{43}$", r"^ Final SPA Data: \S+$")
OPEN = ("-A", "tcp/22")
HEADS = (r"^Chain %s \(1 references\)$", r"^num  target     prot opt source +destination *$")
CLIENT, INNER, ANYWHERE = r"10\.55\.0\.2", r"10\.66\.0\.2", r"0\.0\.0\.0/0"


def chain(name: str, target: str = "", source: str = CLIENT, destination: str = ANYWHERE,
          port: str = "22", end: str = "") -> Tuple[str, ...]:
    """Return the patterns of a chain in the list, and of a rule in it."""
    rule = r"^\d    %-10s +\w+ +--  %s +%s +tcp dpt:%s /\* _exp_\d+ \*/%s" % (
        target, source, destination, port, end)
    return (HEADS[0] % name, HEADS[1], *([rule] if target else []))


LIVES = (
    Life("access", "", STANZA,
         ("^Current fwknopd config settings:$", r"^ +\d. PCAP_INTF {20}=  'eth0'$",
          "^Current fwknopd access settings:$", r"^SOURCE \(1\):  ANY$", "^={62}$",
          "^ +KEY:  <see the access.conf file>$", "^ +HMAC_KEY:  <see the access.conf file>$",
          r"^Using Digest Cache: '\S+' \(entry count = 0\)$",
          "^'filter' table 'FWKNOP_INPUT' chain exists$",
          "^Added jump rule from chain: INPUT to chain: FWKNOP_INPUT$"),
         ((OPEN, (MATCH % 1, *FIELDS, RULE % (
             r"filter -p 6 -s 10\.55\.0\.2 -d 0\.0\.0\.0/0 --dport 22", "ACCEPT", "FWKNOP_INPUT"),
             ADDED % ("access", "FWKNOP_INPUT") % 22)),
          (OPEN, (MATCH % 1, "already exists")),  # fwknopd's second rule is new, the jump is not
          ((*OPEN, "--time-offset-minus", "500"), (
              MATCH % 1, "^ Message String: ", "^ Final SPA Data: ",
              r"SPA data time difference is too great \(5\d\d seconds\)\.")),
          ((*OPEN, "--hmac-digest-type", "sha512"), (
              MATCH % 1, INVALID + ": FKO_ERROR_INVALID_DATA_HMAC_COMPAREFAIL$")),
          (lambda: "hQ" + packet(), (MATCH % 1, INVALID)),
          (lambda: "hQ" + "A" * 500, (r"\[10\.55\.0\.2\] preprocess_spa_data\(\) returned error "
                                      "4096: 'Data is not a valid SPA message format' for",)),
          (lambda: "AAAA" + packet(), (MATCH % 1, INVALID + ".*HMAC_COMPAREFAIL$")),
          (lambda: "U2FsdGVkX1" + packet(), ("error 4096: 'Data is not a valid SPA message for",)),
          (lambda: "%" + packet(), (r"\[10\.55\.0\.2\] preprocess_spa_data\(\) returned error "
                                    "4098: 'Data is not an SPA message' for incoming packet",)),
          (lambda: "A" * 500, (MATCH % 1, r"\(stanza #1\) No stanza encryption mode match for "
                               r"encryption type: 2\.")),
          ((*OPEN, "-N", INNER4 + ":22"), (
              MATCH % 1, r"^   Message Type: 2 \(NAT access msg\)$",
              r"^     Nat Access: 10\.66\.0\.2,22$", r"\(stanza #1\) SPA packet from 10\.55\.0\.2 "
              "requested NAT access, but is not enabled/supported"))),
         ("^Listing rules in fwknopd iptables chains...$", *chain("FWKNOP_INPUT", "ACCEPT"))),
    Life("NAT", "ENABLE_IPT_FORWARDING Y;\nENABLE_IPT_SNAT Y;\n", STANZA,
         tuple(f"^'{table}' table 'FWKNOP_{name}' chain exists$" for table, name in (
             ("filter", "FORWARD"), ("nat", "PREROUTING"), ("nat", "POSTROUTING"),
             ("nat", "MASQUERADE"))),
         (((*OPEN, "-N", INNER4 + ":8080"), (
             RULE % (r"filter -p 6 -s 10\.55\.0\.2 --dport 8080", "ACCEPT", "FWKNOP_FORWARD"),
             ADDED % ("FORWARD", "FWKNOP_FORWARD") % 22)),
          ((*OPEN, "-N", INNER4 + ":80"), (
              RULE % (r"nat -p 6 -s 10\.55\.0\.2 -d 0\.0\.0\.0/0 --dport 22",
                      r"DNAT --to-destination 10\.66\.0\.2:80", "FWKNOP_PREROUTING"),)),
          (lambda: packet(kind=2, extra=[b64(b"a..b,22")]), (
              "Invalid Hostname in NAT SPA message",))),
         (*chain("FWKNOP_FORWARD", "ACCEPT", port="8080"),
          *chain("FWKNOP_PREROUTING", "DNAT", end=r" to:10\.66\.0\.2:80"),
          *chain("FWKNOP_POSTROUTING"),
          *chain("FWKNOP_MASQUERADE", "MASQUERADE", ANYWHERE, INNER, "80", " masq ports: "))),
    Life("SNAT", "ENABLE_IPT_FORWARDING Y;\nENABLE_IPT_SNAT Y;\nSNAT_TRANSLATE_IP 10.66.0.1;\n",
         STANZA, (), (((*OPEN, "-N", INNER4 + ":22"), (
             RULE % (r"nat -p 6 -d 10\.66\.0\.2 --dport 22", r"SNAT --to-source 10\.66\.0\.1",
                     "FWKNOP_POSTROUTING"), ADDED % ("SNAT", "FWKNOP_POSTROUTING") % 22)),),
         chain("FWKNOP_POSTROUTING", "SNAT", ANYWHERE, INNER, end=r" to:10\.66\.0\.1")),
    Life("every port", "ENABLE_IPT_FORWARDING Y;\nENABLE_IPT_SNAT Y;\n",
         STANZA + "FORWARD_ALL Y\n", (), (((*OPEN, "-N", INNER4 + ":22"), (
             RULE % (r"filter -s 10\.55\.0\.2", "ACCEPT", "FWKNOP_FORWARD"),
             RULE % (r"nat -s 10\.55\.0\.2 -d 0\.0\.0\.0/0", r"DNAT --to-destination 10\.66\.0\.2",
                     "FWKNOP_PREROUTING"))),
               ((*OPEN, "-N", "10.66.0.3:22"), (
                   RULE % (r"nat -s 10\.55\.0\.2", "MASQUERADE *", "FWKNOP_MASQUERADE"),)))),
    Life("local NAT", "ENABLE_IPT_LOCAL_NAT Y;\n", STANZA, (),
         (((*OPEN, "--nat-local", "--nat-port", "11111"), (
             ADDED % ("local NAT", "FWKNOP_INPUT") % 11111,
             ADDED % ("DNAT", "FWKNOP_PREROUTING") % 11111)),)),
    Life("test mode", "", STANZA, (),
         ((OPEN, (MATCH % 1, "--test mode enabled, skipping firewall manipulation")),),
         options=("-t",), absent="Added|nowhere"),
    Life("command cycle", "", STANZA + "CMD_CYCLE_OPEN /bin/true $IP\n"
         "CMD_CYCLE_CLOSE /bin/true $IP\nCMD_CYCLE_TIMER 1\n", (),
         ((lambda: packet(text="10.55.0.9,tcp/22"), (
             r"^\[10\.55\.0\.2\] \(stanza #1\) Running CMD_CYCLE_OPEN command: /bin/true 10\.55",
             r"^\[10\.55\.0\.9\] \(stanza #1\) Timer expired, running CMD_CYCLE_CLOSE")),)),
    Life("many stanzas", "", MASK + NO_HMAC % "x" + STANZA.replace("hmac", "other") + STANZA
         + "OPEN_PORTS tcp/80\n" + STANZA, (),
         ((OPEN, (r"^\(stanza #1\) SPA packet \(10\.55\.0\.2 -> 10\.55\.0\.1\) filtered by SOURCE "
                  "and/or DESTINATION criteria$", MATCH % 2,
                  r"\(stanza #3\) Error creating fko context: Args contain invalid data: FKO_ERROR_"
                  "INVALID_DATA_HMAC_COMPAREFAIL$", MATCH % 4, MATCH % 5,
                  ADDED % ("access", "FWKNOP_INPUT") % 22)),
          (OPEN, (MATCH % 3, r"\[10\.55\.0\.2\] \(stanza #4\) SPA Decode",)),
          (OPEN, (r"\(stanza #2\) Error creating fko context: Decryption failed",)),
          (OPEN, (r"\[10\.55\.0\.2\] \(stanza #4\) One or more requested protocol/ports was denied "
                  r"per access\.conf\.",)))),
    Life("without HMAC", "", NO_HMAC % "testkey", (),
         ((OPEN, (MATCH % 1, INVALID + ": FKO_ERROR_INVALID_DATA_DECODE_NON_ASCII$")),
          (lambda: "A" * 172, (MATCH % 1, INVALID)))),
    Life("command", "", STANZA + "ENABLE_CMD_EXEC Y\n", (), (
        (lambda: packet(kind=0, text=CLIENT4 + ",echo" + " x" * 30), (
            MATCH % 1, r"^   Message Type: 0 \(Command msg\)$",
            "Error converting cmd str to argv")),
        (lambda: packet(kind=0, text=CLIENT4 + ",true"), (
            r"^\[10\.55\.0\.2\] \(stanza #1\) CMD_EXEC: command returned 0, pid_status: 0$",)))),
    Life("another destination", "", MASK, (), ((OPEN, (
        r"^\(stanza #1\) SPA packet \(10\.55\.0\.2 -> 10\.55\.0\.1\) filtered by SOURCE and/or "
        "DESTINATION criteria$",)),)),
    Life("packet limit", "", STANZA, (), ((OPEN, ("Incoming packet count limit of 1 reached",)),),
         options=("-C", "1")),
)


def missing(patterns: Tuple[str, ...], text: str) -> str:
    """Return the first pattern that no line has behind those of the patterns before it, or ""."""
    lines = iter(text.splitlines())
    return next((pattern for pattern in patterns
                 if not any(re.search(pattern, line) for line in lines)), "")


@needs_root
@needs_programs("ip", "iptables", "fwknop", "fwknopd")
class LifeTest(unittest.TestCase):
    """Lives of both servers with -v -v, on hosts of their own."""

    @staticmethod
    def send(cable: Cable, step: Any) -> None:
        """Send what a step says."""
        if callable(step):
            cable.client.send(SERVER4, 62201, step())
        else:
            cable.client.run(*FWKNOP, "-D", SERVER4, "-U", "bob", "-a", CLIENT4, *KEYS, *step)

    def live(self, life: Life, program: List[str], config: str) -> None:
        """Let one server live, and look for the patterns."""

        def expect(patterns: Tuple[str, ...], text: Callable[[], str]) -> None:
            wait_for(lambda: not missing(patterns, text()), lambda: "%s of %s in\n%s" % (
                missing(patterns, text()), program[-1], text()[-5000:]))

        with Gateway() as cable:
            site = Server(cable.server, "PCAP_INTF eth0;\n" + config + life.config, life.access)
            os.mkdir(os.path.join(site.directory, "run"))
            made = cable.server.start(*program, *site.files, "-f", "-v", "-v", *life.options)
            made.wait_for(Server.READY)
            expect(life.begin, made.output)
            for step, patterns in life.steps:
                mark = made.mark()
                self.send(cable, step)
                expect(patterns, lambda mark=mark: made.output(mark))  # type: ignore[misc]
            if life.listed:
                expect(life.listed, lambda: cable.server.run(*program, *site.files, "--fw-list"))
            self.assertNotRegex(made.output(), f"(?m){KEY}|{HMAC_KEY}|{life.absent}")

    def test_both(self) -> None:
        """The real server prints it, and so does ours."""
        in_parallel(self, [(life, program) for life in LIVES for program in (
            (["fwknopd"], ""), (SPA_SERVER, "FIREWALL_TYPE iptables;\n"))],
            lambda case: self.live(case[0], *case[1]))


# (options of a client, what both print)
OPTIONS = (
    (["-T", "-v", "-S", "12345"], r"^         source port: 12345$"),
    (["-T", "-v"], r"^Dump of the Decoded Data$"),
    (["-T", "-v", "-P", "http"], r"^GET /[\w-]{200,} HTTP/1\.\d\r?\nUser-Agent: Fwknop/.*\r?\n"
     r"Accept: \*/\*\r?\nHost: 10\.55\.0\.1\r?\n(.*\n)+Test mode enabled, SPA packet not"),
    (["-E", "/no/such", "-l"], "Could not open args file: /no/such"),
    (["-E", "/no/such", "--show-last"], "Could not open args file: /no/such"),
    (["-n", "x", "--save-rc-stanza", "--force-stanza", "-T", "-v", "-v"],
     r"^add_single_var_to_rc\(\) : Updating param \(17\) ACCESS to tcp/22$"),
    (["-s", "-v"], "WARNING: Should use -a or -R to harden SPA against potential MITM attacks$"),
    (["-l", "-v"], r"^Executing: \S*fwknop -"),
    (["-n", "x", "--save-rc-stanza", "--force-stanza", "-T", "-v", "-v", "--nat-rand-port", "-N",
      INNER4], r"Updating param \(31\) NAT_ACCESS to 10\.66\.0\.2\n.*"
     r"Updating param \(36\) NAT_RAND_PORT to Y$"),
    (["-T", "-M", "legacy"], r"Legacy encryption mode is incompatible with HMAC usage"),
    (["-n", "none", "-T"], r"Named configuration stanza: \[none\] was not found"),
)
# (lines of access.conf, what both say of them)
ERRORS = (
    ("SOURCE 1.2.3.x\nKEY a\nHMAC_KEY b\n", "Fatal error parsing IP to int"),
    (STANZA + "ACCESS_EXPIRE 1/2\n", "invalid date value"),
)


@needs_root
@needs_programs("ip", "fwknop", "fwknopd")
class OutputTest(unittest.TestCase):
    """What ends at once."""

    def test_clients(self) -> None:
        """fwknop and ours print the same."""
        with Cable() as cable:
            common = ["-D", SERVER4, "-a", CLIENT4, *OPEN, *KEYS]
            for program in (["fwknop"], SPA_CLIENT[:2]):
                write(os.path.join(cable.client.directory, ".fwknoprc"), "[x]\n")
                for options, pattern in OPTIONS:
                    with self.subTest(program=program[-1], options=options):
                        said = cable.client.run_code(*program, *common, *options)[1]
                        self.assertRegex(said, "(?m)" + pattern)

    def test_error_codes(self) -> None:
        """fwknopd and ours list the same."""
        with Cable() as cable:
            said, ours = [cable.server.run(*program, "--dump-serv-err-codes")
                          for program in (["fwknopd"], SPA_SERVER)]
            self.assertEqual(said, ours)

    def test_errors(self) -> None:
        """fwknopd and ours refuse the same files with the same words."""
        with Cable() as cable:
            for access, words in ERRORS:
                site = Server(cable.server, "", access)
                for program in (["fwknopd"], SPA_SERVER):
                    with self.subTest(program=program[-1], words=words):
                        code, said = cable.server.run_code(*program, *site.files, "-f")
                        self.assertTrue(code, said)
                        self.assertIn(words, said)


if __name__ == "__main__":
    unittest.main()
