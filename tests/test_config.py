"""fwknopd.conf and access.conf: how lines are read, values of directives, dumps and errors.

Where fwknopd is installed, the tokens are compared with what its own dump shows.
"""

import base64
import ipaddress
import os
import re
import sys
import time
import unittest
from typing import Any, Dict, List, Tuple

import spa_server as server
from tests.support import (DirectoryCase, captured, needs_programs, needs_root, run,
                           write)

KEYED = "SOURCE ANY\nKEY k3y\nHMAC_KEY hm4c\n"  # a stanza to put one more line into
NO_FIREWALL = "FIREWALL_TYPE none;\n"  # for files that are parsed on any host
KEY32 = base64.b64encode(bytes(range(32))).decode()
HMAC64 = base64.b64encode(bytes(range(64, 128))).decode()


class ConfigCase(DirectoryCase):
    """A directory for files, and the ways of reading them."""

    def write(self, name: str, text: str, mode: int = 0o600) -> str:
        """Write a file, characters as bytes, and return its path."""
        return write(self.place(name), text.encode("latin-1"), mode)

    def settings(self, text: str) -> Any:
        """Return the settings of a fwknopd.conf with this text."""
        settings = server.ServerSettings()
        server.read_server_settings(self.write("fwknopd.conf", text), settings)
        settings.set_defaults()
        return settings

    def warnings(self, text: str) -> List[str]:
        """Return the warnings of a fwknopd.conf with this text."""
        return list(server.read_server_settings(self.write("fwknopd.conf", text),
                                                server.ServerSettings()))

    def stanzas(self, text: str) -> List[Any]:
        """Return the stanzas of an access.conf with this text."""
        return list(server.read_stanzas(self.write("access.conf", text))[0])

    def stanza(self, lines: str) -> Any:
        """Return a stanza with keys and these lines."""
        return self.stanzas(KEYED + lines + "\n")[0]

    def error_of(self, access: str = KEYED, conf: str = "") -> str:
        """Return the error of these files; fail if they are accepted."""
        try:
            self.settings(conf)
            self.stanzas(access)
        except server.ConfigError as error:
            return str(error).replace(self.directory + "/", "")
        raise AssertionError("accepted: %r %r" % (access, conf))

    def settings_of(self, *arguments: str) -> Any:
        """Return the settings of a command line and the file that it names."""
        return server.read_settings(server.Arguments(list(arguments)))[0]

    def main(self, *arguments: str) -> Tuple[Any, str, str]:
        """Run the program; return exit code, standard output and standard error."""
        return captured(lambda: server.main(list(arguments)))

    def override(self) -> List[str]:
        """Return options that name an iptables, so that a host without one reads files as others.
        """
        for name in ("iptables", "iptables-restore"):
            path = self.write(name, "#!/bin/sh\necho 'iptables v1.8.9 (nf_tables)'\n")
            os.chmod(path, 0o755)
        return ["-O", self.write("override", f"FIREWALL_EXE {self.place('iptables')};\n")]

    def main_with(self, access: str = KEYED, conf: str = "PCAP_INTF lo;\n",
                  *arguments: str) -> Tuple[Any, str, str]:
        """Run the program with these two files."""
        return self.main("-c", self.write("fwknopd.conf", conf),
                         "-a", self.write("access.conf", access), *arguments)


# ------------------------------------------------------------------- lines

# (line of access.conf, name, value); values run to `;` or the line's end and keep their blanks
TOKENS = (
    ("KEY abc", "KEY", "abc"), ("KEY: abc", "KEY", "abc"), ("KEY\tabc", "KEY", "abc"),
    ("KEY:\t  abc", "KEY", "abc"), ("  KEY abc", "KEY", "abc"), ("\tKEY abc", "KEY", "abc"),
    ("KEY abc  ", "KEY", "abc  "), ("KEY a b\tc", "KEY", "a b\tc"), ("KEY abc;", "KEY", "abc"),
    ("KEY abc ; # rest", "KEY", "abc "), ("KEY a#b", "KEY", "a#b"), ("KEY # x", "KEY", "# x"),
    ("KEY abc;#def", "KEY", "abc"), ("KEY a:b", "KEY", "a:b"), ("KEY : abc", "KEY", ": abc"),
    ("KEY \"abc\"", "KEY", "\"abc\""), ("KEY abc\r", "KEY", "abc"), ("KEY a=b", "KEY", "a=b"),
    ("KEY $abc", "KEY", "$abc"), ("KEY \xe9\xff", "KEY", "\xe9\xff"),
    # str.split() would take the bytes a0 and 85 for blanks; C's isspace() does not.
    ("KEY \xa0abc", "KEY", "\xa0abc"), ("KEY \x85abc", "KEY", "\x85abc"),
    ("KEY \x1cabc", "KEY", "\x1cabc"), ("KEY a\rb", "KEY", "a"),
)


class LineTest(ConfigCase):
    """How a line falls into name and value."""

    def lines(self, text: str, colon: bool = True) -> List[Tuple[int, str, str]]:
        """Return number, name and value of each line that counts."""
        return [(line.number, line.name, line.value)
                for line in server.read_lines(self.write("file", text), colon)]

    def test_tokens(self) -> None:
        """Each line of the table is read alike with and without a newline."""
        for text, name, value in TOKENS:
            for end in ("", "\n"):
                with self.subTest(line=text + end):
                    self.assertEqual([(1, name, value)], self.lines(text + end))

    def test_lines_that_do_not_count(self) -> None:
        """Empty lines and comments are skipped; the others keep their numbers."""
        self.assertEqual([(2, "A", "1"), (7, "B", "2")],
                         self.lines("# c\nA 1\n\n  \t\n;x\n  # KEY abc\nB 2\r\n\r\n#"))

    def test_a_colon_belongs_to_the_name_in_fwknopd_conf(self) -> None:
        """`PCAP_INTF: lo` is an unknown directive in fwknopd.conf, as in fwknopd."""
        self.assertEqual([(1, "PCAP_INTF:", "lo")], self.lines("PCAP_INTF: lo", colon=False))

    def test_what_a_line_was_meant_to_be(self) -> None:
        """The error says what is wrong in front of the name or after it, or the right file."""
        blank, space = "expected a blank after it, not ", "a no-break space or the like"
        client = "this belongs in the client's ~/.fwknoprc"
        for text, expected in (
                ("PCAP_INTF=lo", "PCAP_INTF: " + blank + "'='"),
                ("PCAP_INTF: lo", "PCAP_INTF: " + blank + "':'"),
                ("PCAP_INTF\xc2\xa0lo", "PCAP_INTF: " + blank + space),
                ("OPEN_PORTS=tcp/22", "OPEN_PORTS: " + blank + "'='"),
                ("> VERBOSE 1", "VERBOSE: expected nothing before it, not '>'"),
                (">> VERBOSE: 1", "VERBOSE: expected nothing before it, not '>>'"),
                ("\xc2\xa0 VERBOSE 1", "VERBOSE: expected nothing before it, not " + space),
                ("* VERBOSE 1", "VERBOSE: expected nothing before it, not another character"),
                ("OPEN_PORTS tcp/22", "OPEN_PORTS: this belongs in access.conf"),
                ("SPA_SERVER x", "SPA_SERVER: " + client), ("=VERBOSEX 1", "unknown directive")):
            self.assertEqual("fwknopd.conf:1: " + expected, self.error_of(conf=text))
        for text, expected in (
                ("[gate]\nACCESS tcp/22\n",
                 "a stanza with a [name] is the client's, and belongs in its ~/.fwknoprc"),
                ("ACCESS tcp/22", "ACCESS: expected a SOURCE line first"),
                ("SOURCE=ANY", "SOURCE: " + blank + "'='"),
                ("SOURCE:ANY", "SOURCE: " + blank + "':'"),
                ("> SOURCE ANY", "SOURCE: expected nothing before it, not '>'"),
                ("\xc2\xa0SOURCE ANY", "SOURCE: expected nothing before it, not " + space)):
            said = self.error_of(text)
            self.assertTrue(said.startswith("access.conf:1: " + expected), said)
        self.assertEqual("access.conf:4: ACCESS: " + client, self.error_of(KEYED + "ACCESS tcp/22"))

    def test_byte_order_mark(self) -> None:
        """Windows begins a text with one: each file is read as without it."""
        mark = server.BYTE_ORDER_MARK
        keys = self.write("keys", mark + "KEY k3y\nHMAC_KEY hm4c\n")
        self.assertEqual("lo", self.settings(mark + "PCAP_INTF lo;\n").interface)
        self.assertEqual(b"k3y", bytes(self.stanzas(
            mark + "SOURCE ANY\n%include_keys " + keys + "\n")[0].key))

    def test_names_without_a_value(self) -> None:
        """A directive without a value is an error in both files, with its line."""
        for text in ("OPEN_PORTS", "OPEN_PORTS ", "OPEN_PORTS:", "OPEN_PORTS ;", "OPEN_PORTS;"):
            with self.subTest(text=text):
                self.assertEqual("access.conf:5: OPEN_PORTS: expected a value",
                                 self.error_of(KEYED + "\n" + text))
        self.assertEqual("fwknopd.conf:2: VERBOSE: expected a value",
                         self.error_of(conf="#\nVERBOSE ;\n"))

    def test_text_behind_a_semicolon(self) -> None:
        """Text after the semicolon is an error that hides it: fwknopd drops half a list there."""
        for line in ("RESTRICT_PORTS tcp/22; tcp/25", "KEY abc;def", "KEY abc ; rest # x"):
            said = self.error_of("SOURCE ANY\n" + line + "\n")
            self.assertEqual("access.conf:2: %s: expected nothing, or a # and a comment, behind "
                             "the semicolon" % line.split()[0], said)
        for line in ("RESTRICT_PORTS tcp/22, tcp/25;", "RESTRICT_PORTS\ttcp/22, tcp/25 ;  \t",
                     "RESTRICT_PORTS: tcp/22, tcp/25;; # tcp/26", "RESTRICT_PORTS tcp/22,tcp/25;#"):
            ports = set(self.stanza(line).restrict_ports)
            self.assertEqual({("tcp", 22), ("tcp", 25)}, ports, line)

    def test_key_bytes(self) -> None:
        """A KEY is the bytes of its line, blanks at the end and all."""
        for text, _name, value in TOKENS:
            if value.strip() and text.startswith(("KEY ", "KEY:")):
                # also one that begins with `$`: in access.conf nothing is expanded
                with self.subTest(line=text):
                    stanza = self.stanzas("SOURCE ANY\n" + text + "\n")[0]
                    self.assertEqual(value.encode("latin-1"), bytes(stanza.key))
        self.assertEqual(b"h\th\t", bytes(self.stanzas("SOURCE: ANY\nKEY k\nHMAC_KEY\t h\th\t\n")
                                          [0].hmac_key))

    def test_variables(self) -> None:
        """`$NAME` is replaced at the start of a value in fwknopd.conf, and only there."""
        settings = self.settings("FWKNOP_RUN_DIR /a;\nDIGEST_FILE $FWKNOP_RUN_DIR/b;\n"
                                 "FWKNOP_PID_FILE /x/$FWKNOP_RUN_DIR/c;\n")
        self.assertEqual(("/a/b", "/x/$FWKNOP_RUN_DIR/c"),
                         (settings.digest_file, settings.pid_file))
        self.assertEqual("/a/fwknopd.pid", self.settings("FWKNOP_RUN_DIR /a\n").pid_file)
        self.assertEqual("/c/access.conf", self.settings("FWKNOP_CONF_DIR /c\n").access_file)
        self.assertIn("fwknopd.conf:1: DIGEST_FILE: expected",
                      self.error_of(conf="DIGEST_FILE $NO_SUCH_NAME/x\n"))


def parse_dump(text: str) -> Dict[str, str]:
    """Return the values of fwknopd -D by their names."""
    lines = re.findall(r"(?m)^ *(?:\d+\. )?([A-Z_46]+)(?: \(\d+\):| += |:)  ?('?)(.*)\2$", text)
    return {name: value for name, _, value in lines if value != "<not set>"}


@needs_programs("fwknopd")
class PeerTest(ConfigCase):
    """The real fwknopd, which dumps its settings, reads the same values."""

    def peer(self, conf: str, access: str) -> Tuple[int, Dict[str, str]]:
        """Return exit code and dump of the real fwknopd."""
        answer = run(["fwknopd", "-c", self.write("fwknopd.conf", conf),
                      "-a", self.write("access.conf", access), "-D"])
        return answer.returncode, parse_dump(answer.stdout)

    def test_dump(self) -> None:
        """Both print the same, but for words and defaults of ours, in the same shape."""
        conf = ("PCAP_INTF lo;\nFWKNOP_RUN_DIR %s;\nDIGEST_FILE $FWKNOP_RUN_DIR/d;\n"
                "ENABLE_PCAP_PROMISC Y;\n" % self.directory)
        access = KEYED + "REQUIRE_USERNAME N\nREQUIRE_SOURCE_ADDRESS Y\nOPEN_PORTS tcp/22\n"
        theirs, ours = self.peer(conf, access)[1], parse_dump(self.main_with(access, conf, "-D")[1])
        names = set(theirs) & set(ours) - {"FLUSH_IPT_AT_INIT", "HMAC_DIGEST_TYPE", "GPG_HOME_DIR",
                                           "GPG_REQUIRE_SIG"}
        self.assertLess(40, len(names))
        for name in names:
            self.assertEqual(theirs[name], ours[name], name)

    def test_fwknopd_conf(self) -> None:
        """It reads values, comments, blanks and variables alike."""
        conf = ("# comment\n; another\nPCAP_INTF lo;\nPCAP_FILTER     udp port 1234   ; # more\n"
                "MAX_SPA_PACKET_AGE\t77;\n  VERBOSE 0;;\nSYSLOG_IDENTITY my name  # x  ; # y\n"
                "FWKNOP_RUN_DIR %s\nDIGEST_FILE $FWKNOP_RUN_DIR/d.cache;\nUDPSERV_PORT 5 \n"
                "ENABLE_UDP_SERVER Yes;\nSYSLOG_FACILITY LOG_LOCAL3;\r\n" % self.directory)
        code, told = self.peer(conf, KEYED)
        self.assertEqual(0, code)
        settings = self.settings(conf)
        for row in settings.rows():
            if row.name in settings.texts:
                with self.subTest(name=row.name):
                    ours = settings.expand(settings.texts[row.name])
                    self.assertEqual(told[row.name].rstrip(), ours)
        self.assertEqual(10, len(settings.texts))

    def test_keys(self) -> None:
        """The length of a key shows where its value ended."""
        for text, _name, value in TOKENS:
            code, told = self.peer("PCAP_INTF lo;\n", "SOURCE ANY\n" + text + "\n")
            with self.subTest(line=text):
                self.assertEqual((0, str(len(value))), (code, told.get("KEY_LEN")))

    def test_access_conf(self) -> None:
        """It reads names with and without colon, and values with blanks, alike."""
        lines = ("OPEN_PORTS:\ttcp/22, udp/53 ; # x", "FW_ACCESS_TIMEOUT: 7;; # 8",
                 "REQUIRE_USERNAME bob smith", "MAX_FW_TIMEOUT 12\r")
        code, told = self.peer("PCAP_INTF lo;\n", KEYED + "\n".join(lines) + "\n")
        stanza = self.stanza("\n".join(lines))
        self.assertEqual(0, code)
        for name in ("OPEN_PORTS", "FW_ACCESS_TIMEOUT", "REQUIRE_USERNAME", "MAX_FW_TIMEOUT"):
            self.assertEqual(told[name].rstrip(), stanza.texts[name])
        self.assertEqual({("tcp", 22), ("udp", 53)}, set(stanza.open_ports))

    def test_defaults(self) -> None:
        """fwknopd's defaults are those of the table below, with which ours are compared."""
        told = self.peer("PCAP_INTF lo;\n", KEYED)[1]
        for name, value in SPEC_DEFAULTS.items():
            if name not in ("PCAP_INTF", "HMAC_DIGEST_TYPE", "ENCRYPTION_MODE", "SOURCE",
                            "DESTINATION", "REQUIRE_SOURCE_ADDRESS", "GPG_ALLOW_NO_PW",
                            "GPG_REQUIRE_SIG", "GPG_DISABLE_SIG", "GPG_IGNORE_SIG_VERIFY_ERROR",
                            "ALLOW_ANY_USER_AGENT") and value:  # this one came with 2.6.11
                with self.subTest(name=name):
                    mine = value.replace("~", os.path.expanduser("~root")) \
                        .replace("$FWKNOP_RUN_DIR", told["FWKNOP_RUN_DIR"]) \
                        .replace("$FWKNOP_CONF_DIR", told["FWKNOP_CONF_DIR"])
                    theirs = told.get(name, "")
                    if theirs in ("Yes", "No"):  # as it dumps flags of a stanza
                        theirs = theirs[0]
                    if name not in ("ACCESS_FILE",):
                        self.assertEqual(theirs, mine)


# ------------------------------------------------------------------- the tables of directives

# Every name in the first column of tests/spec/fwknop.md 3.2, and of 3.3.
SERVER_NAMES = """
PCAP_INTF PCAP_FILE ENABLE_PCAP_PROMISC PCAP_FILTER PCAP_DISPATCH_COUNT PCAP_LOOP_SLEEP
ENABLE_PCAP_ANY_DIRECTION EXIT_AT_INTF_DOWN MAX_SNIFF_BYTES ENABLE_SPA_PACKET_AGING
MAX_SPA_PACKET_AGE ENABLE_DIGEST_PERSISTENCE RULES_CHECK_THRESHOLD CMD_EXEC_TIMEOUT
ENABLE_SPA_OVER_HTTP ALLOW_ANY_USER_AGENT ENABLE_TCP_SERVER TCPSERV_PORT ENABLE_UDP_SERVER
UDPSERV_PORT UDPSERV_SELECT_TIMEOUT NFQ_INTERFACE NFQ_PORT NFQ_TABLE NFQ_CHAIN NFQ_QUEUE_NUMBER
LOCALE SYSLOG_IDENTITY SYSLOG_FACILITY ENABLE_X_FORWARDED_FOR ENABLE_DESTINATION_RULE
ENABLE_RULE_PREPEND ENABLE_NAT_DNS ENABLE_IPT_FORWARDING ENABLE_IPT_LOCAL_NAT ENABLE_IPT_SNAT
SNAT_TRANSLATE_IP ENABLE_IPT_OUTPUT FLUSH_IPT_AT_INIT FLUSH_IPT_AT_EXIT IPT_INPUT_ACCESS
IPT_OUTPUT_ACCESS IPT_FORWARD_ACCESS IPT_DNAT_ACCESS IPT_SNAT_ACCESS IPT_MASQUERADE_ACCESS
ENABLE_IPT_COMMENT_CHECK FWKNOP_RUN_DIR FWKNOP_CONF_DIR ACCESS_FILE ACCESS_FOLDER FWKNOP_PID_FILE
DIGEST_FILE GPG_HOME_DIR GPG_EXE SUDO_EXE FIREWALL_EXE VERBOSE FAULT_INJECTION_TAG
FIREWD_INPUT_ACCESS IPFW_START_RULE_NUM PF_ANCHOR_NAME PF_EXPIRE_INTERVAL
""".split()
STANZA_NAMES = """
SOURCE DESTINATION OPEN_PORTS RESTRICT_PORTS KEY KEY_BASE64 HMAC_KEY HMAC_KEY_BASE64
HMAC_DIGEST_TYPE ENCRYPTION_MODE FW_ACCESS_TIMEOUT MAX_FW_TIMEOUT REQUIRE_SOURCE_ADDRESS
REQUIRE_SOURCE REQUIRE_USERNAME ENABLE_CMD_EXEC CMD_EXEC_USER CMD_EXEC_GROUP ENABLE_CMD_SUDO_EXEC
CMD_SUDO_EXEC_USER CMD_SUDO_EXEC_GROUP CMD_CYCLE_OPEN CMD_CYCLE_CLOSE CMD_CYCLE_TIMER FORCE_NAT
FORCE_SNAT FORCE_MASQUERADE FORWARD_ALL DISABLE_DNAT ACCESS_EXPIRE ACCESS_EXPIRE_EPOCH
GPG_HOME_DIR GPG_EXE GPG_DECRYPT_ID GPG_DECRYPT_PW GPG_ALLOW_NO_PW GPG_REQUIRE_SIG GPG_DISABLE_SIG
GPG_IGNORE_SIG_VERIFY_ERROR GPG_REMOTE_ID GPG_FINGERPRINT_ID
""".split()
OUR_NAMES = ("OPENSPA_PORT OPENSPA_PRIVATE_KEY OPENSPA_ADK_SECRET FIREWALL_TYPE GUARD_PORTS "
             "NFT_ACCEPT_CHAINS NFT_FORWARD_CHAINS PACKET_LIMIT KNOCKD_CONF METRICS_FILE "
             "OPENSPA_CLIENTS REQUIRE_SAME_ADDRESS ONE_CONNECTION ACCESS_PREFIX4 ACCESS_PREFIX6 "
             "KNOCK_SEQUENCE KNOCK_ONE_TIME_FILE KNOCK_TIMEOUT KNOCK_TCPFLAGS KNOCK_STRICT "
             "KNOCK_STRICT_DUPLICATES REQUIRE_KNOCK ANSWER ON_OPEN ON_CLOSE").split()

# Defaults of fwknop.md 3.2 and 3.3 of the directives that are supported here; "" is unset.
SPEC_DEFAULTS = {
    "PCAP_INTF": "eth0", "PCAP_FILTER": "udp port 62201", "ENABLE_SPA_PACKET_AGING": "Y",
    "MAX_SPA_PACKET_AGE": "120", "ENABLE_DIGEST_PERSISTENCE": "Y", "ENABLE_UDP_SERVER": "N",
    "UDPSERV_PORT": "62201", "ENABLE_TCP_SERVER": "N", "TCPSERV_PORT": "62201",
    "ENABLE_SPA_OVER_HTTP": "N", "ALLOW_ANY_USER_AGENT": "N", "ENABLE_X_FORWARDED_FOR": "N",
    "ENABLE_PCAP_ANY_DIRECTION": "", "ENABLE_PCAP_PROMISC": "N", "PCAP_FILE": "",
    "SYSLOG_IDENTITY": "fwknopd", "SYSLOG_FACILITY": "LOG_DAEMON",
    "ENABLE_DESTINATION_RULE": "N", "ENABLE_RULE_PREPEND": "N", "ENABLE_IPT_OUTPUT": "N",
    "FLUSH_IPT_AT_INIT": "Y", "FLUSH_IPT_AT_EXIT": "Y",
    "IPT_INPUT_ACCESS": "ACCEPT, filter, INPUT, 1, FWKNOP_INPUT, 1",
    "IPT_OUTPUT_ACCESS": "ACCEPT, filter, OUTPUT, 1, FWKNOP_OUTPUT, 1",
    "IPT_FORWARD_ACCESS": "ACCEPT, filter, FORWARD, 1, FWKNOP_FORWARD, 1",
    "IPT_DNAT_ACCESS": "DNAT, nat, PREROUTING, 1, FWKNOP_PREROUTING, 1",
    "IPT_SNAT_ACCESS": "SNAT, nat, POSTROUTING, 1, FWKNOP_POSTROUTING, 1",
    "IPT_MASQUERADE_ACCESS": "MASQUERADE, nat, POSTROUTING, 1, FWKNOP_MASQUERADE, 1",
    "ENABLE_IPT_FORWARDING": "N", "ENABLE_IPT_LOCAL_NAT": "N", "ENABLE_IPT_SNAT": "N",
    "SNAT_TRANSLATE_IP": "", "ENABLE_NAT_DNS": "Y",
    "FWKNOP_RUN_DIR": "/run/fwknop", "FWKNOP_CONF_DIR": "/etc/fwknop",
    "ACCESS_FILE": "$FWKNOP_CONF_DIR/access.conf", "ACCESS_FOLDER": "",
    "FWKNOP_PID_FILE": "$FWKNOP_RUN_DIR/fwknopd.pid",
    "DIGEST_FILE": "$FWKNOP_RUN_DIR/digest.cache", "FIREWALL_EXE": "/usr/sbin/iptables",
    "VERBOSE": "", "CMD_EXEC_TIMEOUT": "", "SUDO_EXE": "/usr/bin/sudo",
    "SOURCE": "ANY", "DESTINATION": "ANY", "OPEN_PORTS": "", "RESTRICT_PORTS": "", "KEY": "",
    "KEY_BASE64": "", "HMAC_KEY": "", "HMAC_KEY_BASE64": "", "HMAC_DIGEST_TYPE": "SHA256",
    "ENCRYPTION_MODE": "CBC", "FW_ACCESS_TIMEOUT": "30", "MAX_FW_TIMEOUT": "300",
    "REQUIRE_SOURCE_ADDRESS": "N", "REQUIRE_USERNAME": "", "ACCESS_EXPIRE": "",
    "ACCESS_EXPIRE_EPOCH": "", "GPG_HOME_DIR": "~/.gnupg", "GPG_EXE": "/usr/bin/gpg",
    "GPG_DECRYPT_ID": "", "GPG_DECRYPT_PW": "", "GPG_ALLOW_NO_PW": "N", "GPG_REQUIRE_SIG": "Y",
    "GPG_DISABLE_SIG": "N", "GPG_IGNORE_SIG_VERIFY_ERROR": "N", "GPG_REMOTE_ID": "",
    "GPG_FINGERPRINT_ID": "", "ENABLE_CMD_EXEC": "N", "CMD_EXEC_USER": "", "CMD_EXEC_GROUP": "",
    "ENABLE_CMD_SUDO_EXEC": "N", "CMD_SUDO_EXEC_USER": "", "CMD_SUDO_EXEC_GROUP": "",
    "CMD_CYCLE_OPEN": "", "CMD_CYCLE_CLOSE": "", "CMD_CYCLE_TIMER": "",
    "FORCE_NAT": "", "FORCE_SNAT": "", "FORCE_MASQUERADE": "N", "FORWARD_ALL": "N",
    "DISABLE_DNAT": "N",
}  # type: Dict[str, str]
DIFFERENT = {
    "PCAP_INTF": "any: a box whose interface is not eth0 works without configuration",
    "FLUSH_IPT_AT_INIT": "N: a restart goes on with the grants it finds",
    "FIREWALL_EXE": "unset: whichever of nft and iptables is needed, from PATH",
    "VERBOSE": "0 instead of unset",
    "GPG_EXE": "unset: gpg from PATH",
    "CMD_EXEC_TIMEOUT": "60: fwknopd reads it and never uses it",
    "ENABLE_PCAP_ANY_DIRECTION": "N instead of unset",
}

# (line, expected) of wrong values; the line's first word is the name in the message
BAD_SERVER = (
    ("PCAP_INTF a b", "interface"), ("PCAP_INTF sixteen-letters-x", "interface"),
    ("PCAP_INTF ../x", "interface"), ("PCAP_FILTER ether proto 1", "[udp|tcp] [src|dst] port N"),
    ("PCAP_FILTER udp port 0", "port N"), ("PCAP_FILTER udp port 65536", "port N"),
    ("PCAP_FILTER udp port 62201 or", "port N"), ("PCAP_FILTER host x.example", "host ADDRESS"),
    ("PCAP_FILTER " + " or ".join("udp port %d" % n for n in range(1, 150)), "400 words"),
    ("ENABLE_PCAP_ANY_DIRECTION 1", "Y or N"), ("ENABLE_PCAP_PROMISC 1", "Y or N"),
    ("PCAP_FILE ~x", "begin with ~"), ("PACKET_LIMIT -1", "0 to 1000000000"),
    ("ENABLE_TCP_SERVER on", "Y or N"), ("TCPSERV_PORT 0", "1 to 65535"),
    ("TCPSERV_PORT 65536", "1 to 65535"), ("ENABLE_SPA_OVER_HTTP 1", "Y or N"),
    ("ALLOW_ANY_USER_AGENT 1", "Y or N"), ("ENABLE_X_FORWARDED_FOR 1", "Y or N"),
    ("ENABLE_SPA_PACKET_AGING 1", "Y or N"), ("ENABLE_UDP_SERVER true", "Y or N"),
    ("MAX_SPA_PACKET_AGE 0", "1 to 100000"), ("MAX_SPA_PACKET_AGE 100001", "1 to 100000"),
    ("MAX_SPA_PACKET_AGE 30m", "1 to 100000"), ("MAX_SPA_PACKET_AGE -1", "1 to 100000"),
    ("MAX_SPA_PACKET_AGE 1.5", "1 to 100000"), ("MAX_SPA_PACKET_AGE \xb2", "1 to 100000"),
    ("UDPSERV_PORT 0", "1 to 65535"), ("UDPSERV_PORT 65536", "1 to 65535"),
    ("UDPSERV_PORT 0x10", "1 to 65535"), ("VERBOSE x", "0 to 9"), ("FIREWALL_TYPE pf", "auto, nft"),
    ("OPENSPA_PORT 0", "1 to 65535"), ("OPENSPA_PRIVATE_KEY ~x", "begin with ~"),
    ("OPENSPA_ADK_SECRET 7O4ZIR1", "7 characters"),
    ("GUARD_PORTS 22", "tcp/PORT"), ("GUARD_PORTS tcp/22,", "tcp/PORT"),
    ("GUARD_PORTS tcp/22-25", "tcp/PORT"), ("GUARD_PORTS icmp/8", "tcp/PORT"),
    ("NFT_ACCEPT_CHAINS filter input", "TABLE CHAIN"), ("NFT_ACCEPT_CHAINS bridge f i", "TABLE"),
    ("NFT_ACCEPT_CHAINS inet fw4 a'b", "TABLE"), ("NFT_ACCEPT_CHAINS inet fw4 a{b", "TABLE CHAIN"),
    ("NFT_ACCEPT_CHAINS inet -f input", "TABLE CHAIN"), ("FIREWALL_EXE ~x", "begin with ~"),
    ("IPT_INPUT_ACCESS ACCEPT, filter, INPUT, 1, FWKNOP_INPUT", "to-chain"),
    ("IPT_INPUT_ACCESS ACCEPT, filter, INPUT, x, FWKNOP_INPUT, 1", "to-chain"),
    ("IPT_INPUT_ACCESS ACCEPT, filter, INPUT, 1, INPUT, 1", "chain of our own"),
    ("IPT_INPUT_ACCESS ACCEPT, filter, INPUT, 1, -F INPUT, 1", "to-chain"),
    ("IPT_OUTPUT_ACCESS ACCEPT, filter, OUTPUT, 1, %s, 1" % ("X" * 29), "28"),
    ("IPT_FORWARD_ACCESS ACCEPT, filter, FORWARD, 1, FORWARD, 1", "chain of our own"),
    ("IPT_DNAT_ACCESS DNAT, nat, PREROUTING", "to-chain"),
    ("IPT_SNAT_ACCESS SNAT nat POSTROUTING 1 X 1", "to-chain"),
    ("IPT_MASQUERADE_ACCESS v4lue", "to-chain"), ("NFT_FORWARD_CHAINS forward", "TABLE CHAIN"),
    ("ENABLE_IPT_FORWARDING 1", "Y or N"), ("ENABLE_IPT_LOCAL_NAT on", "Y or N"),
    ("ENABLE_IPT_SNAT 10.0.0.1", "Y or N"), ("ENABLE_NAT_DNS always", "Y or N"),
    ("SNAT_TRANSLATE_IP eth0", "an IP address"),
    ("SNAT_TRANSLATE_IP 10.0.0.0/24", "an IP address"), ("SNAT_TRANSLATE_IP ::", "the IP address"),
    ("SYSLOG_FACILITY LOG_AUTH", "LOG_DAEMON"), ("FWKNOP_RUN_DIR ~x", "begin with ~"),
    ("FWKNOP_CONF_DIR ~x", "begin with ~"), ("ACCESS_FILE ~x", "begin with ~"),
    ("FWKNOP_PID_FILE ~x", "begin with ~"), ("DIGEST_FILE ~x", "begin with ~"),
    ("ENABLE_DESTINATION_RULE -", "Y or N"), ("ENABLE_RULE_PREPEND 1", "Y or N"),
    ("ENABLE_IPT_OUTPUT on", "Y or N"), ("FLUSH_IPT_AT_INIT -", "Y or N"),
    ("FLUSH_IPT_AT_EXIT -", "Y or N"), ("ENABLE_DIGEST_PERSISTENCE x", "Y or N"),
    ("ACCESS_FOLDER ~x", "begin with ~"), ("KNOCKD_CONF ~x", "begin with ~"),
    ("METRICS_FILE ~x", "begin with ~"),
    ("GPG_HOME_DIR ~x", "begin with ~"), ("GPG_EXE ~x", "begin with ~"),
    ("CMD_EXEC_TIMEOUT -1", "0 to 86400"), ("CMD_EXEC_TIMEOUT 1m", "0 to 86400"),
    ("SUDO_EXE ~x", "begin with ~"), ("VERBOS 1", "unknown directive, expected VERBOSE"),
    ("pcap_intf lo", "unknown directive, expected PCAP_INTF"),
    ("KEY abc", "this belongs in access.conf"), ("GUARD_PORT tcp/22", "expected GUARD_PORTS"),
)
BAD_STANZA = (
    ("SOURCE 10.0.0.0/33", "ANY, or IP"), ("SOURCE host.example", "ANY, or IP"),
    ("SOURCE 10.0.0.1,,10.0.0.2", "ANY, or IP"), ("SOURCE 10.0.0", "ANY, or IP"),
    ("SOURCE 10.0.0.1 10.0.0.2", "ANY, or IP"),
    ("SOURCE fe80::1%eth0", "ANY, or IP"),  # 3.9 and later drop it
    ("SOURCE 256.0.0.1", "Fatal error parsing IP to int"), ("SOURCE 010.0.0.1", "ANY, or IP"),
    ("DESTINATION any,10.0.0", "ANY, or IP"), ("OPEN_PORTS 22", "tcp/PORT"),
    ("OPEN_PORTS tcp/22,,udp/53", "tcp/PORT"), ("OPEN_PORTS ,", "tcp/PORT"),
    ("OPEN_PORTS tcp/0", "tcp/PORT"), ("OPEN_PORTS tcp/65536", "tcp/PORT"),
    ("OPEN_PORTS tcp/22 udp/53", "tcp/PORT"), ("OPEN_PORTS any", "tcp/PORT"),
    ("GPG_HOME_DIR ~x", "begin with ~"), ("GPG_EXE ~x", "begin with ~"),
    ("GPG_DECRYPT_PW __CHANGEME__", "__CHANGEME__"), ("GPG_DECRYPT_PW " + "x" * 256, "255"),
    ("GPG_ALLOW_NO_PW 1", "Y or N"), ("GPG_REQUIRE_SIG 1", "Y or N"),
    ("GPG_DISABLE_SIG -", "Y or N"), ("GPG_IGNORE_SIG_VERIFY_ERROR 1", "Y or N"),
    ("GPG_REMOTE_ID 1234567", "8 or 16 or 40"), ("GPG_REMOTE_ID 1234567G", "8 or 16 or 40"),
    ("GPG_REMOTE_ID ,12345678", "8 or 16 or 40"), ("GPG_REMOTE_ID 0x12345678", "8 or 16 or 40"),
    ("GPG_REMOTE_ID 12345678 12345678 1", "8 or 16 or 40"), ("GPG_REMOTE_ID bob@x", "hex digits"),
    ("GPG_FINGERPRINT_ID 12345678", "40 hex"), ("GPG_FINGERPRINT_ID " + "A" * 39, "40 hex"),
    ("GPG_NO_SUCH_NAME 1", "unknown directive"),
    ("RESTRICT_PORTS tcp/x", "tcp/PORT"), ("RESTRICT_PORTS 22", "tcp/PORT"),
    ("HMAC_DIGEST_TYPE SHA224", "MD5, SHA1"), ("HMAC_DIGEST_TYPE SHA3", "MD5, SHA1"),
    ("ENCRYPTION_MODE GCM", "CBC, ECB"), ("ENCRYPTION_MODE Asymmetric", "GPG_DECRYPT_ID"),
    ("ENCRYPTION_MODE PCBC", "CBC, ECB"), ("FW_ACCESS_TIMEOUT -1", "0 to 8388608"),
    ("FW_ACCESS_TIMEOUT 8388609", "0 to 8388608"), ("FW_ACCESS_TIMEOUT 30m", "0 to 8388608"),
    ("FW_ACCESS_TIMEOUT \xb2", "0 to 8388608"), ("MAX_FW_TIMEOUT 0", "1 to 8388608"),
    ("MAX_FW_TIMEOUT x", "1 to 8388608"), ("ACCESS_PREFIX4 33", "8 to 32"),
    ("ACCESS_PREFIX4 /24", "8 to 32"), ("ACCESS_PREFIX4 0", "8 to 32"),
    ("ACCESS_PREFIX6 129", "32 to 128"), ("ACCESS_PREFIX6 0", "32 to 128"),
    ("REQUIRE_SOURCE_ADDRESS 1", "Y or N"), ("REQUIRE_SOURCE maybe", "Y or N"),
    ("ACCESS_EXPIRE 2030-01-01", "invalid date value"),
    ("ACCESS_EXPIRE 02/30/2030", "invalid date value"),
    ("ACCESS_EXPIRE 13/01/2030", "MM/DD/YYYY"), ("ACCESS_EXPIRE 1/1", "MM/DD/YYYY"),
    ("ACCESS_EXPIRE 0/1/2030", "MM/DD/YYYY"), ("ACCESS_EXPIRE never", "MM/DD/YYYY"),
    ("ACCESS_EXPIRE_EPOCH -1", "0 to"), ("ACCESS_EXPIRE_EPOCH never", "0 to"),
    ("ENABLE_CMD_EXEC 1", "Y or N"),
    ("CMD_EXEC_USER no-such-user", "user of this host"), ("CMD_EXEC_USER 0", "user of this host"),
    ("CMD_EXEC_USER a\0b", ""), ("CMD_EXEC_GROUP no-such-group", "group of this host"),
    ("ENABLE_CMD_SUDO_EXEC x", "Y or N"), ("CMD_SUDO_EXEC_USER -i", "user of this host"),
    ("CMD_SUDO_EXEC_GROUP -h", "group of this host"),
    ("CMD_EXEC_GROUP no-such", "a group of this host"),
    ("CMD_SUDO_EXEC_USER root\nENABLE_CMD_EXEC Y", "ENABLE_CMD_SUDO_EXEC with it"),
    ("CMD_SUDO_EXEC_GROUP root\nENABLE_CMD_EXEC Y", "ENABLE_CMD_SUDO_EXEC with it"),
    ("CMD_CYCLE_OPEN /bin/sh", "expected CMD_CYCLE_CLOSE with it"),
    ("CMD_CYCLE_CLOSE NONE", "expected CMD_CYCLE_OPEN with it"),
    ("CMD_CYCLE_TIMER 3", "expected CMD_CYCLE_OPEN with it"),
    ("CMD_CYCLE_TIMER 0", "1 to 8388608"), ("CMD_CYCLE_TIMER 3m", "1 to 8388608"),
    ("CMD_CYCLE_OPEN /bin/sh $PORTS $X", "only $IP, $SRC"),
    ("CMD_CYCLE_OPEN /bin/sh ${IP}", "only $IP, $SRC"), ("CMD_CYCLE_OPEN /bin/sh $ip", "only $IP"),
    ("CMD_CYCLE_CLOSE /bin/sh $", "only $IP, $SRC"), ("CMD_CYCLE_CLOSE /bin/sh $$IP", "only $IP"),
    ("CMD_CYCLE_OPEN /no/such/program", "program that can be run"),
    ("CMD_CYCLE_CLOSE no-such-program-anywhere $IP", "program that can be run"),
    ("CMD_CYCLE_CLOSE /etc/passwd", "program that can be run"),
    ("CMD_CYCLE_OPEN NONE", "program that can be run"),
    ("CMD_CYCLE_CLOSE none", "program that can be run"),
    ("CMD_CYCLE_OPEN /bin/sh" + " x" * 30, "at most 30 words (Error converting cmd str to argv)"),
    ("ON_OPEN /no/such/program", "program that can be run"), ("ON_OPEN", "expected a value"),
    ("ON_CLOSE NONE", "program that can be run"), ("ON_CLOSE /bin/sh $NAME", "only $IP, $SRC"),
    ("ON_OPEN /bin/sh\nCMD_CYCLE_OPEN /bin/sh\nCMD_CYCLE_CLOSE NONE",
     "ON_OPEN: expected no CMD_CYCLE_OPEN with it"),
    ("FORCE_NAT 10.0.0.1", "IP PORT"), ("FORCE_NAT 10.0.0.1:22", "IP PORT"),
    ("FORCE_NAT 10.0.0.1 0", "IP PORT"), ("FORCE_NAT 10.0.0.1 22 23", "IP PORT"),
    ("FORCE_NAT inner 22", "an IP address"), ("FORCE_NAT 0.0.0.0 22", "the IP address of a host"),
    ("FORCE_NAT 0.1.2.3 22", "the IP address"), ("FORCE_NAT 240.0.0.1 22", "the IP address"),
    ("FORCE_NAT 224.0.0.1 22", "the IP address"), ("FORCE_NAT 010.0.0.1 22", "leading zeros"),
    ("FORCE_SNAT Y", "an IP address"), ("FORCE_SNAT ff02::1", "the IP address"),
    ("FORWARD_ALL 1", "Y or N"), ("DISABLE_DNAT x", "Y or N"),
    ("FORCE_MASQUERADE maybe", "Y or N"), ("NO_SUCH_NAME 1", "unknown directive"),
    ("open_ports tcp/22", "unknown directive, expected OPEN_PORTS"),
    ("OPEN_PORT tcp/22", "unknown directive"),
    ("PCAP_INTF lo", "this belongs in fwknopd.conf"),
    ("%include /no/x", "Access file: '/no/x' was not found"),
    ("%include_folder /no/x", "/no/x: No such file"),
    ("KNOCK_SEQUENCE 7000,70000", "ports such as"), ("KNOCK_SEQUENCE ssh", "ports such as"),
    ("OPENSPA_CLIENTS ~x", "begin with ~"), ("REQUIRE_SAME_ADDRESS 1", "Y or N"),
    ("KNOCK_ONE_TIME_FILE ~x", "begin with ~"), ("KNOCK_TIMEOUT 0", "seconds, 1 to 86400"),
    ("KNOCK_TCPFLAGS syn,ece", "fin, syn, rst"), ("KNOCK_STRICT 1", "Y or N"),
    ("KNOCK_STRICT_DUPLICATES x", "Y or N"), ("ANSWER maybe", "Y or N"),
    ("ONE_CONNECTION once", "Y or N"),
    *((f"{name}\nONE_CONNECTION Y", "expected no ONE_CONNECTION with it") for name in (
        "CMD_CYCLE_OPEN /bin/sh\nCMD_CYCLE_CLOSE NONE", "FORCE_NAT 10.0.0.1 22", "FORWARD_ALL Y",
        "FORCE_SNAT 10.0.0.9", "FORCE_MASQUERADE Y", "DISABLE_DNAT Y")),
    ("REQUIRE_KNOCK maybe", "Y or N"),
    # No packet can carry these, so the stanza would never open anything.
    ("REQUIRE_USERNAME a,b", "expected"), ("REQUIRE_USERNAME j\xf6rg", "expected"),
    ("REQUIRE_USERNAME " + "u" * 49, "expected"),
)

GOOD_SERVER = (
    ("PCAP_FILTER tcp", "packet_filter", server.protocol_filter("tcp")),
    ("PCAP_FILTER udp dst port 9", "packet_filter", server.port_filter("udp", "dst", 9, 9)),
    ("PCAP_FILE /x.pcap", "capture_file", "/x.pcap"), ("PACKET_LIMIT 7", "packet_limit", 7),
    ("TCPSERV_PORT 65535", "tcp_port", 65535), ("ENABLE_TCP_SERVER y", "tcp_server", True),
    ("PCAP_INTF eth0.5", "interface", "eth0.5"), ("MAX_SPA_PACKET_AGE 1", "max_packet_age", 1),
    ("ENABLE_UDP_SERVER yes", "udp_server", True), ("ENABLE_UDP_SERVER n", "udp_server", False),
    ("GUARD_PORTS tcp/22, udp/53,tcp/22", "guard_ports", {("tcp", 22), ("udp", 53)}),
    ("NFT_ACCEPT_CHAINS inet fw4 input_wan, ip6 f i", "nft_accept_chains",
     (("inet", "fw4", "input_wan"), ("ip6", "f", "i"))),
    ("IPT_INPUT_ACCESS ACCEPT,filter,INPUT,3,MYSPA,1", "input_access",
     ("ACCEPT", "filter", "INPUT", 3, "MYSPA")),
    ("FIREWALL_TYPE NFT", "firewall", "nft"), ("SYSLOG_FACILITY log_local7", "syslog_facility",
                                               "LOG_LOCAL7"),
    ("FIREWALL_EXE /usr/sbin/nft", "firewall_program", "/usr/sbin/nft"),
)
GOOD_STANZA = (
    ("OPEN_PORTS tcp/22, UDP/53 ,tcp/22", "open_ports", {("tcp", 22), ("udp", 53)}),
    ("FW_ACCESS_TIMEOUT 0", "grant_seconds", 0), ("FW_ACCESS_TIMEOUT 8388608", "grant_seconds",
                                                 8388608),
    ("ENCRYPTION_MODE legacy", "mode", "LEGACY"), ("ENCRYPTION_MODE cTr", "mode", "CTR"),
    ("REQUIRE_SOURCE Y", "require_source", True), ("REQUIRE_USERNAME bob smith ",
                                                   "require_username", "bob smith"),
    ("ACCESS_EXPIRE_EPOCH 1795366688", "expires", 1795366688),
    ("ACCESS_EXPIRE 1/2/2030", "expires", int(time.mktime((2030, 1, 2, 0, 0, 0, 0, 0, -1)))),
    ("ACCESS_PREFIX4 24", "prefix4", 24), ("ACCESS_PREFIX6 56", "prefix6", 56),
    ("FORCE_MASQUERADE N", "force_masquerade", False), ("FORWARD_ALL yes", "forward_all", True),
    ("DISABLE_DNAT Y", "disable_dnat", True),
    ("FORCE_NAT 10.0.0.1  22 ", "force_nat", (ipaddress.ip_address("10.0.0.1"), 22)),
    ("FORCE_NAT fd66::2 65535", "force_nat", (ipaddress.ip_address("fd66::2"), 65535)),
    ("FORCE_SNAT 10.0.0.9", "force_snat", ipaddress.ip_address("10.0.0.9")),
)  # type: Any
IGNORED_SERVER = [name for name in SERVER_NAMES if name not in SPEC_DEFAULTS]


class DirectiveTest(ConfigCase):
    """Each directive: its row, its good values and its bad ones."""

    def test_every_directive_has_a_row(self) -> None:
        """Names of tests/spec/fwknop.md 3.2 and 3.3 and our own are known in the right file."""
        for name in SERVER_NAMES + OUR_NAMES[:10]:
            self.assertIsNotNone(server.ServerSettings.row(name), name)
        for name in STANZA_NAMES + OUR_NAMES[10:]:
            self.assertIsNotNone(server.Stanza.row(name), name)
        known = [name for table in (server.ServerSettings, server.Stanza)
                 for row in table.rows() for name in row.names]
        supported = set(SPEC_DEFAULTS) | set(OUR_NAMES)
        for table in (server.ServerSettings, server.Stanza):
            for row in table.rows():
                if not isinstance(row, server.Ignored):
                    self.assertIn(row.name, supported)
        self.assertLessEqual(supported, set(known))

    def test_no_name_stands_in_two_rows(self) -> None:
        """No file has two rows of one name."""
        for table in (server.ServerSettings, server.Stanza):
            names = [name for row in table.rows() for name in set(row.names)]
            self.assertEqual(sorted(set(names)), sorted(names))

    def test_every_row_says_what_it_is(self) -> None:
        """Each row has help for the README, and a default that its own parser takes."""
        for settings in (server.ServerSettings(), server.Stanza(1), server.KnockdOptions()):
            settings.set_defaults()
            for row in settings.rows():
                self.assertTrue(row.help, row.name)
                getattr(settings, row.attribute)

    def test_defaults_are_parsed_once_at_one_step(self) -> None:
        """Before set_defaults() no row has a value; stanzas share them; $NAME waits for it."""
        settings = server.ServerSettings()
        with self.assertRaisesRegex(AttributeError, "UDPSERV_PORT has no value before"):
            self.assertIsNone(settings.udp_port)
        settings.set_line(server.Line("f", 1, "ACCESS_FILE", "$DIGEST_FILE/$x"))
        settings.set_line(server.Line("f", 2, "FWKNOP_RUN_DIR", "/a"))
        settings.set_defaults()
        self.assertEqual(("/run/fwknop/digest.cache/$x", "/a/digest.cache", "/a/fwknopd.pid"),
                         (settings.access_file, settings.digest_file, settings.pid_file))
        first, second = self.stanzas(KEYED + KEYED)
        for row in server.Stanza.rows():
            if not first.is_set(row):
                with self.subTest(row.name):
                    self.assertIs(getattr(first, row.attribute), getattr(second, row.attribute))

    def test_defaults(self) -> None:
        """Defaults are fwknop's, except for the table of reasoned differences."""
        different = set()
        for name, value in SPEC_DEFAULTS.items():
            row = server.ServerSettings.row(name) or server.Stanza.row(name)
            assert row is not None
            if row.default != value:
                different.add(name)
        self.assertEqual(set(DIFFERENT), different)

    def shown(self, text: str) -> str:
        """Return the name as an error shows it: only if it can't be part of a key."""
        name = text.split(None, 1)[0]
        return "" if name.islower() and name[0] != "%" else name + ": "

    def test_bad_values(self) -> None:
        """An error is one line `file:line: NAME: expected ...`."""
        for text, expected in BAD_SERVER:
            with self.subTest(line=text):
                said = self.error_of(conf="#\n" + text + "\n")
                self.assertTrue(said.startswith("fwknopd.conf:2: " + self.shown(text)), said)
                self.assertIn(expected, said)
                self.assertNotIn("\n", said)
        for text, expected in BAD_STANZA:
            with self.subTest(line=text):
                said = self.error_of(KEYED + text + "\n")
                self.assertTrue(said.startswith("access.conf:4: " + self.shown(text)), said)
                self.assertIn(expected, said)
                self.assertNotIn("\n", said)

    def test_every_supported_directive_is_in_the_table_of_bad_values(self) -> None:
        """The table tests every parser, except those that take everything."""
        takes_all = {"SYSLOG_IDENTITY", "KEY", "KEY_BASE64", "HMAC_KEY", "HMAC_KEY_BASE64",
                     "GPG_DECRYPT_ID"}
        tried = {line.split()[0] for line, _ in BAD_SERVER + BAD_STANZA}
        self.assertEqual(set(), set(SPEC_DEFAULTS) - tried - takes_all)
        self.assertEqual(set(), set(OUR_NAMES) - tried)

    def test_good_values(self) -> None:
        """Values at the limits become those of the table."""
        for text, attribute, value in GOOD_SERVER:
            with self.subTest(line=text):
                self.assertEqual(value, getattr(self.settings(text + ";\n"), attribute))
        for text, attribute, value in GOOD_STANZA:
            with self.subTest(line=text):
                self.assertEqual(value, getattr(self.stanza(text), attribute))

    def test_ignored(self) -> None:
        """Each ignored directive is warned of once, with file and line, and its value not shown."""
        self.assertGreater(len(IGNORED_SERVER), 15)
        for name in IGNORED_SERVER:
            with self.subTest(name=name):
                said = self.warnings("#\n%s v4lue;\n" % name)
                self.assertEqual(1, len(said))
                self.assertRegex(said[0], r"fwknopd\.conf:2: %s is ignored: \S" % name)
                self.assertNotIn("v4lue", said[0])
                self.assertNotIn("v4lue", said[0])

    def test_the_first_wrong_line_stops_the_start(self) -> None:
        """main() exits with 3, prints one line to stderr and nothing to stdout."""
        for conf, access in (("VERBOS 1\n", KEYED), ("", "SOURCE ANY\nKEY k\nCMD_CYCLE_OPEN x\n")):
            code, out, err = self.main_with(access, conf, "--exit-parse-config")
            self.assertEqual((3, ""), (code, out))
            self.assertEqual(1, len(err.splitlines()), err)

    def test_later_lines_win(self) -> None:
        """A directive that stands twice has the later value, as in fwknopd."""
        self.assertEqual(9, self.stanza("FW_ACCESS_TIMEOUT 8\nFW_ACCESS_TIMEOUT 9").grant_seconds)
        self.assertEqual(9, self.settings("MAX_SPA_PACKET_AGE 8\nMAX_SPA_PACKET_AGE 9")
                         .max_packet_age)

    def test_warnings_of_settings(self) -> None:
        """Settings that weaken the protection are warned of."""
        for conf, fragment in (("ENABLE_SPA_PACKET_AGING N;", "never pruned"),
                               ("ENABLE_DIGEST_PERSISTENCE N;", "while this process"),
                               ("ENABLE_DIGEST_PERSISTENCE N;", "to whoever sends it if it names "
                                "no address (REQUIRE_SOURCE_ADDRESS Y")):
            self.assertIn(fragment, " ".join(self.settings(conf).warnings()))
        self.assertEqual([], self.settings("").warnings())
        for lines, fragment in (("SOURCE ANY\nKEY k", "no HMAC"),
                                (KEYED, "no OPEN_PORTS"),
                                (KEYED, "REQUIRE_SOURCE_ADDRESS not enabled for access stanza "
                                        "source: 'ANY'"),
                                ("SOURCE ANY\nKEY %s\nENCRYPTION_MODE legacy" % ("k" * 17), "16")):
            said = server.read_stanzas(self.write("access.conf", lines))[1]
            self.assertIn(fragment, " ".join(said))
            self.assertTrue(all(line.startswith("(stanza #1) ") for line in said), said)
        quiet = KEYED + "OPEN_PORTS tcp/22\nREQUIRE_SOURCE_ADDRESS Y\n"
        self.assertEqual([], server.read_stanzas(self.write("access.conf", quiet))[1])


class StanzaTest(ConfigCase):
    """Stanzas as a whole, and their keys."""

    def test_stanzas(self) -> None:
        """SOURCE begins a stanza; each has its own settings, in the file's order."""
        first, second = self.stanzas(KEYED + "OPEN_PORTS tcp/1\nSOURCE: 10.0.0.0/8\nKEY other\n")
        self.assertEqual((1, 2), (first.number, second.number))
        self.assertEqual((b"k3y", b"other"), (first.key, second.key))
        self.assertTrue(first.open_ports)
        self.assertFalse(second.open_ports)
        self.assertFalse(second.hmac_key)
        values = vars(first)  # of 10,000 stanzas none may take more memory than it needs
        self.assertLessEqual(sys.getsizeof(values), sys.getsizeof(dict.fromkeys(list(values))))

    def test_files_that_are_not_enough(self) -> None:
        """A file needs a stanza, nothing before the first SOURCE, and keys in each stanza."""
        for text, expected in (
                ("", "access.conf: expected a stanza"), ("# x\n\n", "access.conf: expected a st"),
                ("KEY k\nSOURCE ANY\n", "access.conf:1: KEY: expected a SOURCE line first"),
                ("SOURCE ANY\nOPEN_PORTS tcp/22\n", "access.conf:1: SOURCE: expected a KEY"),
                (KEYED + "SOURCE ANY\n", "access.conf:4: SOURCE: expected a KEY or KEY_BASE64"),
                ("SOURCE ANY\nHMAC_KEY h\n", "access.conf:1: SOURCE: expected a KEY"),
                ("SOURCE ANY\nGPG_ALLOW_NO_PW Y\nGPG_REMOTE_ID ABCD1234\n",
                 "access.conf:1: SOURCE: expected a KEY or KEY_BASE64 in this stanza, or GPG_D")):
            with self.subTest(text=text):
                self.assertTrue(self.error_of(text).startswith(expected), self.error_of(text))

    def test_keys(self) -> None:
        """Keys are read at the limits of their length, raw and base64, with and without padding."""
        for lines, key, hmac_key in (
                ("KEY " + "k" * 32, b"k" * 32, b""), ("KEY_BASE64 " + KEY32, bytes(range(32)), b""),
                ("KEY_BASE64 " + KEY32.rstrip("="), bytes(range(32)), b""),
                ("KEY_BASE64 %s  " % KEY32, bytes(range(32)), b""),
                ("KEY_BASE64 eA==", b"x", b""), ("KEY x\nHMAC_KEY " + "h" * 128, b"x", b"h" * 128),
                ("KEY x\nHMAC_KEY_BASE64 " + HMAC64, b"x", bytes(range(64, 128)))):
            with self.subTest(lines=lines):
                stanza = self.stanzas("SOURCE ANY\n" + lines + "\n")[0]
                found = bytes(stanza.only_one(server.Stanza.key, server.Stanza.key_base64)), bytes(
                    stanza.only_one(server.Stanza.hmac_key, server.Stanza.hmac_key_base64))
                self.assertEqual((key, hmac_key), found)
                self.assertEqual(bool(hmac_key), stanza.keys.has_hmac)

    def test_wrong_keys(self) -> None:
        """Keys that are too long, equal, unchanged, empty, given twice or no base64 are errors."""
        b64 = base64.b64encode
        for lines, line, expected in (
                ("KEY " + "k" * 33, 2, "32 bytes"), ("KEY __CHANGEME__", 2, "__CHANGEME__"),
                ("KEY __CHANGEME__  ", 2, "__CHANGEME__"),
                ("KEY_BASE64 __CHANGEME__", 2, "__CHANGEME__"),
                ("KEY_BASE64 " + b64(bytes(33)).decode(), 2, "32 bytes"),
                ("KEY_BASE64 " + b64(b"__CHANGEME__").decode(), 2, "__CHANGEME__"),
                ("KEY_BASE64 a-b_", 2, "base64"), ("KEY_BASE64 abcde", 2, "base64"),
                ("KEY_BASE64 ab cd", 2, "base64"), ("KEY_BASE64 ==", 2, "1 to 32 bytes, not 0"),
                ("KEY a\nKEY_BASE64 YQ==", 3, "only one of KEY and KEY_BASE64"),
                ("KEY_BASE64 YQ==\nKEY a", 2, "only one of KEY and KEY_BASE64"),
                ("KEY a\nHMAC_KEY b\nHMAC_KEY_BASE64 Yg==", 4, "only one of HMAC_KEY and"),
                ("KEY a\nHMAC_KEY " + "h" * 129, 3, "128 bytes"),
                ("KEY a\nHMAC_KEY __CHANGEME__", 3, "__CHANGEME__"),
                ("KEY a\nHMAC_KEY_BASE64 __CHANGEME__", 3, "__CHANGEME__"),
                ("KEY a\nHMAC_KEY_BASE64 " + b64(bytes(129)).decode(), 3, "128 bytes"),
                ("KEY a\nHMAC_KEY a", 1, "HMAC key that is not the encryption key"),
                ("KEY a\nHMAC_KEY_BASE64 YQ==", 1, "HMAC key that is not the encryption key"),
                # An HMAC key of no bytes must not be taken for none.
                ("KEY a\nHMAC_KEY_BASE64 ==", 3, "expected"),
                ("KEY a\nHMAC_KEY_BASE64 =", 3, "expected")):
            with self.subTest(lines=lines):
                said = self.error_of("SOURCE ANY\n" + lines + "\n")
                self.assertTrue(said.startswith("access.conf:%d: " % line), said)
                self.assertIn(expected, said)

    def test_odd_keys(self) -> None:
        """Lengths and looks that hint at a lost character or the wrong directive, without the key.

        What fwknopd accepts is only warned of.
        """
        b64, half = base64.b64encode(b"k" * 32).decode(), KEY32[:20]
        for line, is_error, expected in (
                ("KEY_BASE64 " + KEY32[1:].rstrip("="), False, ""),
                ("KEY_BASE64 " + KEY32[1:], False, "43 characters, is one missing?"),
                ("KEY_BASE64 " + KEY32[2:].rstrip("="), True, "41 characters, is one missing?"),
                ("HMAC_KEY_BASE64 " + HMAC64[1:], True, "87 characters, is one missing?"),
                ("KEY " + KEY32, True, "32 bytes, not 44, that looks like KEY_BASE64"),
                ("HMAC_KEY " + HMAC64, False, "that looks like HMAC_KEY_BASE64"),
                ("HMAC_KEY " + "x" * 87 + "-", False, ""), ("HMAC_KEY " + "x" * 88, False, "")):
            line += "" if line.startswith("KEY") else "\nKEY_BASE64 " + b64
            text = "SOURCE ANY\n" + line + "\n"
            with self.subTest(line):
                if is_error:
                    said = self.error_of(text)
                else:
                    said = "".join(server.read_stanzas(self.write("access.conf", text))[1])
                    self.assertEqual(bool(expected), "access.conf:2: " in said, said)
                self.assertIn(expected, said)
                self.assertNotIn(half[:8], said)

    def test_a_key_without_hmac_beside_one_with(self) -> None:
        """The stanza without HMAC is warned of: packets for the other one open there, too."""
        bare, tagged = "KEY_BASE64 aw==", "KEY k\nHMAC_KEY h"
        for first, second, warned, marked in (
                (tagged, bare, [2], [True, False]), (bare, tagged, [1], [False, True]),
                (tagged, tagged, [], [False] * 2), (bare, bare, [], [False] * 2)):
            text = "SOURCE ANY\n%s\nSOURCE 10.0.0.0/8\n%s\n" % (first, second)
            with self.subTest(text=text):
                stanzas = self.stanzas(text)
                self.assertEqual(marked, [stanza.keys.accepts_bare for stanza in stanzas])
                self.assertEqual(
                    ["(stanza #%d) another stanza has this key with an HMAC" % each
                     for each in warned],
                    [each.partition(":")[0] for each in server.mark_shared_keys(stanzas)])

    def test_both_forms_of_expiry(self) -> None:
        """Of ACCESS_EXPIRE and ACCESS_EXPIRE_EPOCH the earlier one holds."""
        early = int(time.mktime((2030, 1, 2, 0, 0, 0, 0, 0, -1)))
        for lines in ("ACCESS_EXPIRE 01/02/2030\nACCESS_EXPIRE_EPOCH 9999999999",
                      "ACCESS_EXPIRE_EPOCH %d\nACCESS_EXPIRE 01/01/2040" % early):
            self.assertEqual(early, self.stanza(lines).expires)

    def test_unreadable_files(self) -> None:
        """A missing file and a directory are one line with the path, and exit code 3."""
        missing = os.path.join(self.directory, "missing")
        good = self.write("access.conf", KEYED)
        for conf, access in ((missing, good), (self.directory, good),
                             (self.write("fwknopd.conf", ""), missing),
                             (self.write("fwknopd.conf", ""), self.directory)):
            code, out, err = self.main("-c", conf, "-a", access, "--exit-parse-config")
            with self.subTest(conf=conf, access=access):
                hint = "\nhint: --init tcp/22 makes one" if access == missing else ""
                self.assertEqual((3, ""), (code, out))
                self.assertRegex(err, r"^[^\n]*%s\n$" % hint)
                self.assertRegex(err, r"%s: \w" % re.escape(missing if missing in (conf, access)
                                                           else self.directory))

    def test_binary_files(self) -> None:
        """Any bytes are read, or are an error without a traceback."""
        for text in ("".join(map(chr, range(256))), "SOURCE ANY\nKEY \0\1\2\xff\n",
                     "\xff\xfeS\0O\0"):
            try:
                self.stanzas(text)
            except server.ConfigError:
                pass


# ------------------------------------------------------------------- what is shown

MARKER = "s3cretMARKERs3cret"
MARKER64 = base64.b64encode(MARKER.encode()).decode()  # 24 characters


class SecretTest(ConfigCase):
    """No output shows a secret."""

    def clean(self, text: str) -> None:
        """Fail if a secret, or a good part of one, is in the text."""
        for part in (MARKER, MARKER64, MARKER[::-1], MARKER.encode().hex(), MARKER[:9],
                     MARKER64[:9]):
            self.assertNotIn(part, text)

    stanza_text = ("SOURCE ANY\nKEY %s\nHMAC_KEY_BASE64 %s\nGPG_DECRYPT_PW %s\n"
                   "SOURCE ANY\nKEY_BASE64 %s\nHMAC_KEY %s\nENCRYPTION_MODE legacy\n"
                   % (MARKER, base64.b64encode(MARKER[::-1].encode()).decode(), MARKER, MARKER64,
                      MARKER[::-1]))

    def test_dump_and_start(self) -> None:
        """-D, --exit-parse-config and the warnings show no secret."""
        for option in ("-D", "--exit-parse-config"):
            code, out, err = self.main_with(self.stanza_text, NO_FIREWALL, option)
            self.assertEqual(0, code, err)
            self.clean(out + err)

    def test_objects(self) -> None:
        """repr() and str() of stanzas, keys and settings show no secret."""
        for stanza in self.stanzas(self.stanza_text):
            for each in (stanza, stanza.keys, stanza.key, stanza.hmac_key, stanza.key_base64,
                         stanza.keys.secret, stanza.keys.hmacs, stanza.keys.lock):
                with self.subTest(object=type(each).__name__, stanza=stanza.number):
                    self.clean("%r %s %s" % (each, each, [each]))
                    self.clean("{} {!r}".format(each, each))

    def test_errors(self) -> None:
        """No error about a line with a secret shows it."""
        lines = ["%s %s" % (name, value) for name in ("KEY", "HMAC_KEY", "KEY_BASE64",
                                                      "HMAC_KEY_BASE64")
                 for value in (MARKER * 10, MARKER64 + "!", MARKER64 + "A", "$" + MARKER,
                               "$KEY" + MARKER, "__CHANGEME__" + MARKER * 9, MARKER + "\xff" * 200)]
        lines += ["KEY %s\nKEY_BASE64 %s" % (MARKER, MARKER64), "KEYX " + MARKER,
                  "KEY %s\nHMAC_KEY %s" % (MARKER, MARKER), "KEY %s\nNOPE x" % MARKER,
                  "KEY %s\nOPEN_PORTS x" % MARKER, "GPG_DECRYPT_PW %s" % MARKER]
        # A line without a blank after its name, or the second half of a key that a mailer broke,
        # is not the name of a directive.
        lines += ["KEY:" + MARKER, "KEY=" + MARKER, "KEY_BASE64=" + MARKER64, MARKER,
                  "KEY %s\n%s" % (MARKER, MARKER64), "HMAC_KEY_BASE64=%s " % MARKER64,
                  "KEY\xa0" + MARKER, "KEY=%s %s" % (MARKER, MARKER)]
        for text in lines:
            with self.subTest(lines=text):
                try:
                    self.stanzas("SOURCE ANY\n" + text + "\n")
                except server.ConfigError as error:
                    self.clean("%s %r %s" % (error, error, error.hint))
                self.clean(self.main_with("SOURCE ANY\n" + text + "\n", "", "-D")[1])
                self.clean(self.main_with("SOURCE ANY\n" + text + "\n", "", "-D")[2])

    def test_errors_carry_no_cause_with_a_secret(self) -> None:
        """Python chains no exception with a secret to an error."""
        with self.assertRaises(server.ConfigError) as caught:
            self.stanzas("SOURCE ANY\nKEY_BASE64 %s!\n" % MARKER64)
        self.assertIsNone(caught.exception.__cause__)
        self.assertTrue(caught.exception.__suppress_context__)

    def test_keys_in_the_other_file(self) -> None:
        """A key in fwknopd.conf is an unknown directive, whose value is not shown."""
        self.clean(self.error_of(conf="KEY %s;\n" % MARKER))


def comparable(settings: Any) -> Dict[str, Any]:
    """Return every value in force by its name, in a form that can be compared."""
    found = {}
    for row in settings.rows():
        if row.secret or isinstance(row, server.Ignored):
            continue
        value = getattr(settings, row.attribute)
        found[row.name] = (value.everything, value.masks) if row.name in ("SOURCE", "DESTINATION") \
            else value
    return found


class DumpTest(ConfigCase):
    """-D prints the configuration as fwknopd does."""

    access = (KEYED + "OPEN_PORTS tcp/22, udp/53\nFW_ACCESS_TIMEOUT 7\nREQUIRE_SOURCE Y\n"
              "REQUIRE_USERNAME bob smith\nACCESS_EXPIRE 01/02/2030\nACCESS_PREFIX4 24\n"
              "ENCRYPTION_MODE ctr\nHMAC_DIGEST_TYPE sha3_256\nFORWARD_ALL N\nGPG_HOME_DIR /x\n"
              "SOURCE 10.0.0.0/8, 192.168.1.1, fd00::/8\nDESTINATION 1.2.3.4\nKEY_BASE64 %s\n"
              "RESTRICT_PORTS tcp/25\nMAX_FW_TIMEOUT 5\n" % KEY32)
    confs = (
        "", "PCAP_INTF lo;\nPCAP_FILTER udp port 1 or (dst port 2 && ! ip6);\nVERBOSE 2;\n"
        "GUARD_PORTS tcp/22;\nNFT_ACCEPT_CHAINS inet f i;\nNFQ_PORT 1;\nNFQ_TABLE x;\n"
        "FWKNOP_RUN_DIR /a;\nDIGEST_FILE $FWKNOP_RUN_DIR/d;\nENABLE_PCAP_PROMISC Y;\n"
        "IPT_INPUT_ACCESS ACCEPT, filter, INPUT, 1, MYSPA, 1;\nENABLE_SPA_PACKET_AGING N;\n",
        # The dump has the value, not the variable, which may mean something else there.
        "DIGEST_FILE $FWKNOP_RUN_DIR/d;\nFWKNOP_RUN_DIR /a;\n")

    def check(self, access: str, conf: str, *options: str) -> None:
        """Fail unless what a dump shows of the lines that were set reads back to the same values.
        """
        code, out, err = self.main_with(access, conf, "-D", *options)
        self.assertEqual(0, code, err)
        first = self.settings_of("-c", self.write("fwknopd.conf", conf),
                                 "-a", self.write("access.conf", access), *options)
        stanzas = self.stanzas(access)
        parts = out.replace("\nSOURCE (", "\n\0SOURCE (").split("\0")
        self.assertEqual(1 + len(stanzas), len(parts))
        texts = ["".join("%s %s\n" % (name, re.sub("<see.*", "eHh4" if "HMAC" in name else "YWJj",
                                                   value))
                         for name, value in parse_dump(part).items() if name in each.texts)
                 for part, each in zip(parts, [first, *stanzas])]
        again = [self.settings(texts[0]), *self.stanzas("".join(texts[1:]))]
        for shown in (comparable, lambda each: [each.is_set(row) for row in each.rows()
                                                if not isinstance(row, server.Ignored)]):
            self.assertEqual(list(map(shown, [first, *stanzas])), list(map(shown, again)))

    def test_round_trip(self) -> None:
        """The dump parses back to the same settings."""
        for conf in self.confs:
            with self.subTest(conf=conf):
                self.check(self.access.replace("HMAC_KEY hm4c\n", "HMAC_KEY_BASE64 eHh4\n"), conf)

    def test_round_trip_of_options(self) -> None:
        """The dump has the values of the command line."""
        for options in (("-i", "eth7", "-U", "-v", "-v"), ("-P", "udp port 7"), ("-r", "/b"),
                        ("-d", "/d", "-p", "/p")):
            with self.subTest(options=options):
                self.check(KEYED, "FWKNOP_RUN_DIR /a;\n", *options)
        self.check(KEYED, "FWKNOP_RUN_DIR /a;\nDIGEST_FILE $FWKNOP_RUN_DIR/d;\n", "-r", "/b")

    def test_dump_shows_every_directive(self) -> None:
        """The dump has every directive, set or not."""
        out = self.main_with(KEYED, "", "-D")[1]
        for name in sorted(set(SPEC_DEFAULTS) | set(OUR_NAMES)):
            self.assertRegex(out, r"(?m)^ *(\d+\. )?%s( \(1\):|:| +=)  " % name)


class CommandLineTest(ConfigCase):
    """Options, exit codes and warnings of main()."""

    def test_options_override_files(self) -> None:
        """Each option wins over another value in the file."""
        conf = ("PCAP_INTF a0;\nPCAP_FILTER udp port 1;\nENABLE_UDP_SERVER N;\nDIGEST_FILE /a/d;\n"
                "FWKNOP_PID_FILE /a/p;\nFWKNOP_RUN_DIR /a;\nACCESS_FILE /a/access.conf;\n")
        path = self.write("fwknopd.conf", conf)
        for options, attribute, value in (
                (["-i", "b0"], "interface", "b0"), (["--interface", "any"], "interface", "any"),
                (["-P", "ip6"], "packet_filter", server.protocol_filter("ip6")),
                (["-C", "5"], "packet_limit", 5), (["--pcap-file", "/x"], "capture_file", "/x"),
                (["--pcap-file", "/x"], "aging", False),
                (["--pcap-any-direction"], "any_direction", True),
                (["-U"], "udp_server", True), (["-d", "/b/d"], "digest_file", "/b/d"),
                (["-p", "/b/p"], "pid_file", "/b/p"), (["-r", "/b"], "run_directory", "/b"),
                (["-a", "/b/access.conf"], "access_file", "/b/access.conf"),
                (["-a", "x.conf"], "access_file", os.path.join(os.getcwd(), "x.conf")),
                (["-v"], "verbose", 1), ([], "interface", "a0")):
            with self.subTest(options=options):
                self.assertEqual(value, getattr(self.settings_of("-c", path, *options), attribute))

    def test_run_dir_moves_what_depends_on_it(self) -> None:
        """-r moves files that fwknopd.conf does not set."""
        settings = self.settings_of("-c", self.write("fwknopd.conf", ""), "-r", "/b")
        self.assertEqual(("/b/digest.cache", "/b/fwknopd.pid"),
                         (settings.digest_file, settings.pid_file))

    def test_exit_codes(self) -> None:
        """The exit code is 0 if done, 2 for the command line, 3 for the configuration."""
        for arguments, code in (
                (["-V"], 0), (["--help"], 0), (["--no-such-option"], 2), (["extra"], 2),
                (["-c"], 2), (["-Vx"], 2), (["--version=1"], 2)):
            with self.subTest(arguments=arguments):
                self.assertEqual(code, self.main(*arguments)[0])
        for option in (["-D"], ["--exit-parse-config"], ["--exit-parse-config", "-D"]):
            self.assertEqual(0, self.main_with(KEYED, NO_FIREWALL, *option)[0])
            self.assertEqual(3, self.main_with("", NO_FIREWALL, *option)[0])
            self.assertEqual(3, self.main_with(KEYED, NO_FIREWALL + "VERBOS 1\n", *option)[0])
            self.assertEqual(2, self.main_with(KEYED, NO_FIREWALL, "-P", "tcp 9", *option)[0])

    def test_options_that_do_not_go_together(self) -> None:
        """Two actions are an error, whichever comes first."""
        for words in (["-S", "-K"], ["--fw-list", "-D"], ["--init", "tcp/22", "--unguard"]):
            code, out, err = self.main(*words)
            self.assertEqual((2, ""), (code, out))
            self.assertIn("does not go with", err)

    def test_dashes(self) -> None:
        """An option with a dash that an editor has made of a hyphen; else it is no option."""
        for word, said in (("\u2013t", "'\\x2013t': is that dash a hyphen?"), (
                "\u2014fw-list", "'\\x2014fw-list': is that dash a hyphen?"),
                ("\u2013tx", "unexpected argument"), ("\u2013", "unexpected argument")):
            code, out, err = self.main(word)
            self.assertEqual((2, ""), (code, out))
            self.assertIn(said, err)

    def test_init_with_bad_ports(self) -> None:
        """--init with bad ports is a wrong command line, and makes no file."""
        conf, access = (os.path.join(self.directory, "new", name) for name in ("f.conf", "a.conf"))
        for ports in ("ssh", "tcp/99999", "", "tcp/22,"):
            with self.subTest(ports=ports):
                code, out, err = self.main("--init", ports, "-c", conf, "-a", access)
                self.assertEqual((2, ""), (code, out))
                self.assertIn("--init: expected", err)
        self.assertFalse(os.path.exists(os.path.join(self.directory, "new")))

    def test_init_beside_files_that_do_not_hide_the_port(self) -> None:
        """--init is refused beside files that leave the port open, and makes no file."""
        missing = os.path.join(self.directory, "missing.conf")
        for conf, access in ((self.write("f.conf", "GUARD_PORTS tcp/80;\n"), missing),
                             (missing, self.write("a.conf", KEYED))):
            code, out, err = self.main("--init", "tcp/22", "-c", conf, "-a", access)
            self.assertEqual((3, ""), (code, out))
            self.assertRegex(err, r"--init: already there: \S+\nhint: set GUARD_PORTS tcp/22 in")
            self.assertFalse(os.path.exists(missing))

    def test_directives_without_effect(self) -> None:
        """A directive without effect, for want of NAT or another firewall, is warned of."""
        settings = self.settings("NFT_ACCEPT_CHAINS inet filter input;\nENABLE_RULE_PREPEND Y;\n"
                                 "ENABLE_IPT_SNAT Y;\nSNAT_TRANSLATE_IP 192.0.2.1;\n")
        for kind, first in (("iptables", "NFT_ACCEPT_CHAINS has no effect with iptables"),
                            ("nft", "ENABLE_RULE_PREPEND has no effect with nftables")):
            self.assertEqual([first, "ENABLE_IPT_SNAT has no effect without ENABLE_IPT_FORWARDING",
                              "SNAT_TRANSLATE_IP has no effect without ENABLE_IPT_FORWARDING"],
                             server.idle_directives(settings, kind))
        self.assertEqual([], server.idle_directives(self.settings(
            "ENABLE_IPT_FORWARDING Y;\nENABLE_IPT_SNAT Y;\n"), "iptables"))

    def test_warnings_of_what_is_over_or_meant_so(self) -> None:
        """An expired stanza is warned of; old packets in a capture file are not."""
        stanza = self.stanza("ACCESS_EXPIRE 01/01/2020")
        self.assertIn("(stanza #1) has expired (ACCESS_EXPIRE): delete it, or let it end "
                      "later", stanza.validate())
        self.assertNotIn("expired", "".join(self.stanza("ACCESS_EXPIRE 01/01/2037").validate()))
        for lines, warned in (("", True), ("PCAP_FILE /x;\n", False)):
            found = self.settings("ENABLE_SPA_PACKET_AGING N;\n" + lines)
            self.assertEqual(warned, "ENABLE_SPA_PACKET_AGING" in "".join(found.warnings()))

    def test_a_list_of_interfaces(self) -> None:
        """A list of interfaces is an error."""
        self.assertEqual("fwknopd.conf:1: PCAP_INTF: expected the name of one interface, or `any`, "
                         "not 'eth0,eth1'", self.error_of(conf="PCAP_INTF eth0,eth1;\n"))

    def test_the_firewall_is_checked_with_the_files(self) -> None:
        """A firewall that would stop the start stops --exit-parse-config."""
        code, out, err = self.main_with(KEYED, "FIREWALL_TYPE nft;\n", "--exit-parse-config")
        self.assertEqual((3, ""), (code, out))
        self.assertIn("GUARD_PORTS: expected it", err)

    def test_a_start_that_fails_leaves_no_lock(self) -> None:
        """A failed start leaves no lock that makes another process look like the server."""
        run_directory = os.path.join(self.directory, "run")
        os.makedirs(os.path.join(run_directory, "digest.cache"))
        code, _, _ = self.main_with(KEYED, NO_FIREWALL, "-r", run_directory, "-f")
        self.assertEqual(1, code)
        self.assertIsNone(server.running_server(os.path.join(run_directory, "fwknopd.pid")))

    def test_a_firewall_that_can_not_be(self) -> None:
        """A guard without a firewall, and a firewall program that is none, are errors."""
        for conf, expected in (("FIREWALL_TYPE none;\nGUARD_PORTS tcp/22;\n", ":2: GUARD_PORTS: "),
                               ("FIREWALL_EXE /bin/false;\n", ":1: FIREWALL_EXE: "),
                               ("FIREWALL_EXE /no/such/nft;\n", ":1: FIREWALL_EXE: "),
                               ("FIREWALL_TYPE nft;\n", "GUARD_PORTS: expected it, or NFT_ACCEPT")):
            with self.subTest(conf=conf):
                run = os.path.join(self.directory, "run")
                code, out, err = self.main_with(KEYED, conf, "-r", run)
                self.assertEqual((3, ""), (code, out))
                self.assertIn(expected, err)
                self.assertFalse(os.path.exists(run))

    def test_exit_parse_config(self) -> None:
        """--exit-parse-config prints fwknopd's line."""
        self.assertEqual((0, "Configs parsed, exiting.\n"),
                         self.main_with(KEYED, NO_FIREWALL, "--exit-parse-config")[:2])

    def test_version(self) -> None:
        """--version prints the version and the SHA-256 of this very file."""
        code, out, err = self.main("-V")
        self.assertEqual((0, ""), (code, err))
        self.assertIn(server.VERSION, out)
        self.assertRegex(out, r"sha256 [0-9a-f]{64}\n$")

    def test_permission_warnings(self) -> None:
        """Files that others can read are warned of, in fwknopd's words."""
        for mode, warned in ((0o600, False), (0o400, False), (0o644, True), (0o640, True),
                             (0o602, True), (0o610, True)):
            path = self.write("access%o.conf" % mode, KEYED, mode)
            conf = self.write("fwknopd.conf", NO_FIREWALL)
            _code, _out, err = self.main("-c", conf, "-a", path, "--exit-parse-config")
            with self.subTest(mode=oct(mode)):
                self.assertEqual(warned, "file: %s permissions should only be user read/write "
                                 "(0600, -rw-------)" % path in err)

    @needs_root
    def test_owner_warnings(self) -> None:
        """A file that belongs to somebody else is warned of."""
        path = self.write("access.conf", KEYED)
        os.chown(path, 12345, -1)
        self.assertIn("owner: 12345", " ".join(server.permission_warnings(path)))

    def test_warnings_are_shown_when_parsing(self) -> None:
        """Stanza warnings and ignored directives reach standard error."""
        _code, _out, err = self.main_with("SOURCE ANY\nKEY k\n", NO_FIREWALL + "LOCALE C;\n",
                                          "--exit-parse-config")
        for fragment in ("no HMAC_KEY", "LOCALE is ignored", "no OPEN_PORTS"):
            self.assertIn(fragment, err)

    def test_status_without_a_server(self) -> None:
        """-S, -K and -R find nothing, say so and leave no file behind."""
        conf = self.write("fwknopd.conf", "FWKNOP_RUN_DIR %s/run;\n" % self.directory)
        for option in ("-S", "-K", "-R"):
            code, out, _err = self.main("-c", conf, option)
            self.assertEqual((1, "No running fwknopd detected.\n"), (code, out))
        self.assertFalse(os.path.exists(os.path.join(self.directory, "run")))


if __name__ == "__main__":
    unittest.main()
