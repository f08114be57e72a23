"""What is read besides the two files: includes, key files, folders, overrides; and the options.

Where fwknopd is installed, it reads the same files, and both find the same stanzas.
"""

import hashlib
import io
import os
import re
import stat
import unittest
from typing import Any, List
from unittest import mock

import spa_server as server
from tests.support import needs_programs, needs_root, run, skip
from tests.test_config import HMAC64, KEY32, KEYED, ConfigCase

QUIET = KEYED + "OPEN_PORTS tcp/22\nREQUIRE_SOURCE_ADDRESS Y\n"  # nothing is warned of


class FilesCase(ConfigCase):
    """Files in a directory, and what the server makes of them."""

    def put(self, mode: int = 0o600, **files: str) -> None:
        """Write files; `__` in a name is a slash, `_conf` at its end is `.conf`."""
        for name, text in files.items():
            path = re.sub("_conf$", ".conf", name.replace("__", "/"))
            os.makedirs(os.path.dirname(self.place(path)), exist_ok=True)
            self.write(path, text.replace("HERE", self.directory), mode)

    def read(self, *options: str) -> Any:
        """Return the configuration of a.conf and f.conf, which the options go before."""
        return server.read_configuration(server.Arguments(
            ["-c", self.place("f.conf"), "-a", self.place("a.conf")] + list(options)),
            self.directory)

    def sources(self, *options: str) -> List[str]:
        """Return the SOURCE of each stanza, in their order."""
        stanzas = self.read(*options).stanzas
        self.assertEqual(list(range(1, len(stanzas) + 1)), [each.number for each in stanzas])
        return [each.texts["SOURCE"] for each in stanzas]

    def refusal(self, *options: str) -> str:
        """Return why the files are not taken, or why a stanza with a key file opens nothing."""
        try:
            for text in [each.void for each in self.read(*options).stanzas if each.void]:
                return str(text).replace(self.directory + "/", "")
        except server.ConfigError as error:
            return str(error).replace(self.directory + "/", "")
        raise AssertionError("accepted")


def stanza(source: str, *lines: str) -> str:
    """Return a stanza with keys, and lines after them."""
    return "\n".join(["SOURCE " + source, "KEY k3y", "HMAC_KEY hm4c"] + list(lines)) + "\n"


class IncludeTest(FilesCase):
    """%include and %include_folder."""

    def setUp(self) -> None:
        """Make an empty fwknopd.conf."""
        super().setUp()
        self.put(f_conf="")

    def test_a_stanza_goes_on_after_an_include(self) -> None:
        """Stanzas come in the order of their SOURCE lines; what follows belongs where it stands."""
        self.put(a_conf=stanza("10.0.0.1", "%include HERE/b", "OPEN_PORTS tcp/1",
                               "%include: HERE/c;", "FW_ACCESS_TIMEOUT 7") + stanza("10.0.0.4"),
                 b=stanza("10.0.0.2", "OPEN_PORTS tcp/2"), c=stanza("10.0.0.3"))
        stanzas = self.read().stanzas
        self.assertEqual(["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"], self.sources())
        self.assertEqual([{("tcp", 1)}, {("tcp", 2)}, set(), set()],
                         [each.open_ports for each in stanzas])
        self.assertEqual([7, 30, 30, 30], [each.grant_seconds for each in stanzas])

    def test_an_access_file_of_includes_alone(self) -> None:
        """An %include may stand before any SOURCE; what follows it needs one of its own."""
        self.put(a_conf="%include HERE/b\n%include HERE/b\n", b=stanza("10.0.0.2"))
        self.assertEqual(["10.0.0.2", "10.0.0.2"], self.sources())
        self.put(a_conf="%include HERE/b\nOPEN_PORTS tcp/22\n")
        self.assertEqual("a.conf:2: OPEN_PORTS: expected a SOURCE line first: it begins a stanza",
                         self.refusal())
        for word in ("include", "%INCLUDE", "%Include_Keys"):
            self.put(a_conf=word + " HERE/b\n" + stanza("ANY"))
            self.assertEqual("a.conf:1: expected %include, %include_folder or %include_keys, in "
                             "small letters", self.refusal())
        self.put(a_conf=stanza("ANY", "%include HERE/b"), b="OPEN_PORTS tcp/22\n")
        self.assertEqual("b:1: OPEN_PORTS: expected a SOURCE line first: it begins a stanza",
                         self.refusal())

    def test_depth(self) -> None:
        """Three files deep, as many beside each other as one likes; a loop ends there, too."""
        self.put(a_conf=stanza("1.1.1.1") + "%include HERE/b\n" * 9,
                 b=stanza("2.2.2.2", "%include HERE/c"), c=stanza("3.3.3.3"))
        self.assertEqual(["1.1.1.1"] + ["2.2.2.2", "3.3.3.3"] * 9, self.sources())
        self.put(c=stanza("3.3.3.3", "%include HERE/d"), d=stanza("4.4.4.4"))
        self.assertEqual("c:4: %include: Refusing to go deeper than 3 levels. Lost in Limbo: 'c'",
                         self.refusal())
        self.put(a_conf=stanza("1.1.1.1", "%include HERE/a.conf"))
        self.assertEqual("a.conf:4: %include: Refusing to go deeper than 3 levels. Lost in Limbo: "
                         "'a.conf'", self.refusal())
        self.put(f__x_conf=stanza("1.1.1.1", "%include_folder HERE/f"),
                 a_conf=stanza("ANY", "%include_folder HERE/f"))
        self.assertEqual("f/x.conf:4: %include_folder: Refusing to go deeper than 3 levels. Lost in"
                         " Limbo: 'f/x.conf'", self.refusal())

    def test_relative_paths(self) -> None:
        """Begin where the server was started, not beside the file, as in fwknopd."""
        self.put(a_conf="%include sub/b\n%include_folder folder\n", c=stanza("3.3.3.3"),
                 sub__b=stanza("2.2.2.2", "%include c"), sub__c=stanza("9.9.9.9"),
                 folder__x_conf="SOURCE 4.4.4.4\n%include_keys sub/keys\n",
                 sub__keys="KEY k\nHMAC_KEY h\n")
        self.assertEqual(["2.2.2.2", "3.3.3.3", "4.4.4.4"], self.sources())

    def test_folder(self) -> None:
        """Every *.conf sorted by name, and nothing else; an empty one adds nothing."""
        self.put(d__b_conf=stanza("2.2.2.2"), d__a_conf=stanza("1.1.1.1") + stanza("1.1.1.2"),
                 d__x="junk\n", d__y_conf_="junk\n", a_conf="%include_folder HERE/d\n")
        os.mkdir(self.place("empty"))
        self.assertEqual(["1.1.1.1", "1.1.1.2", "2.2.2.2"], self.sources())
        self.put(a_conf=stanza("ANY", "%include_folder HERE/empty"))
        self.assertEqual(["ANY"], self.sources())

    def test_what_is_not_there(self) -> None:
        """File and line of the include; a pipe, which could block the server, is no file."""
        os.mkdir(self.place("directory"))
        os.mkfifo(self.place("pipe"))
        for name in ("%include", "%include_keys"):
            for path in ("none", "directory", "pipe", ""):
                self.put(a_conf=stanza("ANY", "%s HERE/%s" % (name, path)))
                with self.subTest(name=name, path=path):
                    self.assertEqual("a.conf:4: %s: Access file: '%s' was not found." % (
                        name, path), self.refusal())
        self.put(a_conf=stanza("ANY", "%include_folder HERE/none"))
        self.assertEqual("a.conf:4: %include_folder: none: No such file or directory",
                         self.refusal())
        os.makedirs(self.place("d/x.conf"))
        self.put(a_conf=stanza("ANY", "%include_folder HERE/d"))
        self.assertEqual("a.conf:4: %include_folder: Access file: 'd/x.conf' was not found.",
                         self.refusal())

    def test_errors_name_the_included_file(self) -> None:
        """In a line, and of a stanza as a whole."""
        self.put(a_conf=stanza("ANY", "%include HERE/b"))
        for text, expected in (
                (stanza("ANY", "OPEN_PORTS ssh"), "b:4: OPEN_PORTS: expected tcp/PORT"),
                (stanza("ANY", "OPEN_PORT tcp/1"), "b:4: OPEN_PORT: unknown directive"),
                ("\nSOURCE ANY\n", "b:2: SOURCE: expected a KEY or KEY_BASE64"),
                (stanza("ANY") + "SOURCE ANY\n", "b:4: SOURCE: expected a KEY")):
            self.put(b=text)
            with self.subTest(text=text):
                self.assertIn(expected, self.refusal())

    def test_permissions_of_every_file(self) -> None:
        """A warning for each file that others can read, whichever way it was included."""
        self.put(0o644, f_conf="", o="", a_conf=QUIET + "%include HERE/b\n%include_folder HERE/d\n"
                 "%include_keys HERE/k\n", b=QUIET, d__x_conf=QUIET, k="KEY k\n")
        warned = [line.split()[2] for line in self.read("-O", self.place("o")).warnings
                  if "permissions should only be" in line]
        self.assertEqual([self.place(name) for name in ("f.conf", "o", "a.conf", "b", "d/x.conf",
                                                        "k")], warned)
        for name in ("f.conf", "o", "a.conf", "b", "d/x.conf", "k"):
            os.chmod(self.place(name), 0o600)
        self.assertEqual(["Including key file: '%s'" % self.place("k")],
                         self.read("-O", self.place("o")).warnings)


class KeyFileTest(FilesCase):
    """%include_keys."""

    def test_keys(self) -> None:
        """Take the place of keys before it, and are told of in fwknopd's words."""
        self.put(f_conf="", a_conf="SOURCE ANY\n%include_keys HERE/k\nOPEN_PORTS tcp/22\n",
                 k="# mine\nKEY_BASE64: %s\nHMAC_KEY_BASE64 %s;\nHMAC_DIGEST_TYPE sha512\n"
                 % (KEY32, HMAC64))
        configuration = self.read()
        found = configuration.stanzas[0]
        self.assertEqual((bytes(range(32)), bytes(range(64, 128)), "SHA512"),
                         (found.key_base64, found.hmac_key_base64, found.hmac_type.name))
        self.assertEqual({("tcp", 22)}, found.open_ports)
        self.assertIn("Including key file: '%s'" % self.place("k"), configuration.warnings)

    def test_anything_else_is_refused(self) -> None:
        """fwknopd skips it; who wrote RESTRICT_PORTS there would believe in it. And a file of the
        user's must not name what root runs, nor open more."""
        self.put(f_conf="", a_conf=stanza("ANY", "%include_keys HERE/k"))
        for line in ("OPEN_PORTS tcp/22", "RESTRICT_PORTS tcp/22", "SOURCE ANY", "GPG_EXE /tmp/x",
                     "GPG_HOME_DIR /tmp/x", "REQUIRE_USERNAME bob", "ENABLE_CMD_EXEC Y",
                     "CMD_CYCLE_OPEN /tmp/x", "%include /etc/x", "%include_keys HERE/k",
                     "ENCRYPTION_MODE ECB", "NO_SUCH_NAME 1", "ON_OPEN /bin/sh"):
            self.put(k="KEY k\n%s\n" % line)
            with self.subTest(line=line):
                self.assertEqual("k:2: %s: expected only keys here, and the rest beside "
                                 "%%include_keys" % line.split()[0], self.refusal())

    def test_errors_show_no_secret(self) -> None:
        """Neither of a key nor of a line that may be a part of one."""
        self.put(f_conf="", a_conf="SOURCE ANY\n%include_keys HERE/k\n")
        for text, expected in (("KEY_BASE64 s3cret!\n", "k:1: KEY_BASE64: "),
                               ("KEY k\ns3cret s3cret\n", "k:2: expected only keys"),
                               ("KEY k\ns3cret\n", "k:2: expected a value"),
                               ("", "a.conf:1: SOURCE: expected a KEY")):
            self.put(k=text)
            said = self.refusal()
            with self.subTest(text=text):
                self.assertIn(expected, said)
                self.assertNotIn("s3cret", said)

    def test_files_that_are_meant_to_do_harm(self) -> None:
        """Zero bytes, more than fits the memory, and what has become a pipe since it was found."""
        self.put(f_conf="", a_conf="SOURCE ANY\n%include_keys HERE/k\n")
        for text, expected in (
                ("KEY k\nGPG_DECRYPT_ID a\0b\n", "k:2: GPG_DECRYPT_ID: expected a value without "
                 "zero bytes"),
                ("KEY k\0\n", "k:1: KEY: expected a value without zero bytes"),
                ("\0 k\n", "k:1: expected a value without zero bytes")):
            self.put(k=text)
            with self.subTest(text=text):
                self.assertEqual(expected, self.refusal())
        with open(self.place("k"), "wb") as file:
            file.truncate(1 << 40)
        self.assertEqual("k: expected at most 1048576 bytes", self.refusal())
        os.unlink(self.place("k"))
        os.mkfifo(self.place("k"))
        with mock.patch("os.path.isfile", return_value=True):
            self.assertEqual("k: expected a regular file", self.refusal())
        with self.assertRaisesRegex(server.CommandError, "^/bin/echo: embedded null byte"):
            server.run_program(["/bin/echo", "a\0b"])

    def test_a_bad_file_voids_its_own_stanza(self) -> None:
        """Nobody else is locked out; the log says which; --exit-parse-config calls it an error."""
        self.put(f_conf="FIREWALL_TYPE none;\n", a_conf=QUIET + "SOURCE ANY\nOPEN_PORTS tcp/80\n"
                 "REQUIRE_SOURCE_ADDRESS Y\n%include_keys HERE/k\n" + stanza("10.0.0.3"))
        for text, problem in (
                ("KEY k\nHMAC_KEY h\nOPEN_PORTS tcp/22\n", "k:3: OPEN_PORTS: expected only keys"),
                ("# nothing\n", "a.conf:6: SOURCE: expected a KEY"),
                ("KEY k\nHMAC_KEY k\n", "a.conf:6: SOURCE: expected an HMAC key that is not"),
                ("KEY k\nGPG_DECRYPT_ID x\n", "k:2: GPG_DECRYPT_ID: expected GPG_DECRYPT_PW"),
                (None, "a.conf:9: %include_keys: Access file: 'k' was not found.")):
            if text is None:
                os.unlink(self.place("k"))
            else:
                self.put(k=text)
            with self.subTest(problem=problem):
                found = self.read()
                self.assertEqual([False, True, False], [bool(each.void) for each in found.stanzas])
                self.assertIsNone(found.stanzas[1].keys)
                self.assertIsNotNone(found.stanzas[2].keys)
                (said,) = found.voids()
                self.assertIn(problem, said.replace(self.directory + "/", ""))
                self.assertRegex(said, r"^\(stanza #2\) .*; this stanza opens nothing$")
                code, out, err = self.main("-c", self.place("f.conf"), "-a", self.place("a.conf"),
                                           "--exit-parse-config")
                self.assertEqual((3, ""), (code, out))
                self.assertIn(said, err)
        self.put(k="KEY k\nHMAC_KEY h\n")
        self.assertEqual([], self.read().voids())

    def test_a_key_of_somebody_else_voids_nobody(self) -> None:
        """Whether that one has an HMAC or not; it is warned of."""
        for first, second in (("KEY k\n", "KEY k\nHMAC_KEY h\n"),
                              ("KEY k\nHMAC_KEY h\n", "KEY k\n")):
            self.put(f_conf="FIREWALL_TYPE none;\n", k=second,
                     a_conf="SOURCE ANY\n" + first + "SOURCE ANY\n%include_keys HERE/k\n")
            found = self.read()
            self.assertEqual([], found.voids())
            self.assertIn("another stanza has this key", " ".join(found.warnings))

    def test_a_secret_key_that_is_missing_voids_its_own_stanza(self) -> None:
        """GPG_DECRYPT_ID may stand in a key file, and is looked for when the server starts."""
        self.put(f_conf="GPG_EXE /bin/false;\n", k="GPG_DECRYPT_ID x\nGPG_ALLOW_NO_PW Y\n"
                 "GPG_DISABLE_SIG Y\n", a_conf="SOURCE ANY\n%include_keys HERE/k\n" + QUIET)
        found = self.read()
        server.load_gpg(found.settings, found.stanzas)
        self.assertIn("k:1: GPG_DECRYPT_ID: expected a secret key", found.stanzas[0].void)
        self.assertIsNone(found.stanzas[0].gpg)
        self.assertEqual("", found.stanzas[1].void)

    def test_before_a_stanza(self) -> None:
        """There is nothing that the keys could belong to."""
        self.put(f_conf="", a_conf="%include_keys HERE/k\n" + QUIET, k="KEY k\n")
        self.assertEqual("a.conf:1: %include_keys: expected a SOURCE line first: it begins a "
                         "stanza", self.refusal())


class FolderTest(FilesCase):
    """ACCESS_FOLDER and --access-folder."""

    def test_instead_of_the_access_file(self) -> None:
        """Which is not read then, and need not be there; one that was named is told of."""
        self.put(f_conf="ACCESS_FOLDER HERE/d;\n", d__b_conf=stanza("2.2.2.2"),
                 d__a_conf=stanza("1.1.1.1"))
        self.assertEqual(["1.1.1.1", "2.2.2.2"], self.sources())
        self.assertIn("ACCESS_FILE %s is not read: there is an ACCESS_FOLDER"
                      % self.place("a.conf"), self.read().warnings)
        self.put(f_conf="", e__x_conf=stanza("3.3.3.3"))
        self.assertEqual(["3.3.3.3"], self.sources("--access-folder", self.place("e")))
        self.assertEqual(["3.3.3.3"], [each.texts["SOURCE"] for each in server.read_configuration(
            server.Arguments(["-c", self.place("f.conf"), "--access-folder", self.place("e")])
        ).stanzas])

    def test_bad_folders(self) -> None:
        """One that is missing, one without a stanza, and a bad file in one."""
        self.put(f_conf="#\nACCESS_FOLDER HERE/d;\n")
        self.assertEqual("f.conf:2: ACCESS_FOLDER: d: No such file or directory", self.refusal())
        os.mkdir(self.place("d"))
        self.assertEqual("f.conf:2: ACCESS_FOLDER: expected files named *.conf in d",
                         self.refusal())
        self.put(d__x_conf="# empty\n")
        self.assertEqual("d/x.conf: expected a stanza, which begins with SOURCE", self.refusal())
        self.put(d__x_conf=stanza("ANY", "FW_ACCESS_TIMEOUT soon"))
        self.assertIn("d/x.conf:4: FW_ACCESS_TIMEOUT: expected", self.refusal())

    def test_folders_that_others_can_write_to(self) -> None:
        """They can put a stanza there that runs commands as root, or replace a file."""
        self.put(f_conf="ACCESS_FOLDER HERE/d;\n", d__x_conf="%include_folder HERE/e\n" + QUIET,
                 e__x_conf=QUIET, a_conf=QUIET)
        for name, mode, warned in (
                ("d", 0o777, True), ("d", 0o1777, True), ("d", 0o720, True), ("d", 0o755, False),
                ("e", 0o1777, True), ("e", 0o700, False), (".", 0o777, True), (".", 0o1777, False)):
            with self.subTest(name=name, mode=oct(mode)):
                os.chmod(self.place(name), mode)
                folder = self.directory if name == "." else self.place(name)
                text = "[-] folder: %s is writable by others (mode %04o)" % (folder, mode)
                self.assertIs(warned, any(each.startswith(text) for each in self.read().warnings))
                os.chmod(self.place(name), 0o700)

    def test_init_with_a_folder(self) -> None:
        """No new stanza is made, which nobody would read."""
        self.put(f_conf="ACCESS_FOLDER HERE/d;\nGUARD_PORTS tcp/22;\n", d__x_conf=QUIET)
        arguments = server.Arguments(["--init", "tcp/22", "-c", self.place("f.conf"), "-a",
                                      self.place("new.conf")])
        with mock.patch("sys.stdout", io.StringIO()) as out:
            server.run_init(arguments, server.read_settings(arguments)[0])
        self.assertIn("There is a configuration already", out.getvalue())
        self.assertFalse(os.path.exists(self.place("new.conf")))


class OverrideTest(FilesCase):
    """-O."""

    def test_later_files_win_and_the_command_line_over_all(self) -> None:
        """fwknopd.conf, first, second, command line; each sees what stands before it."""
        self.put(a_conf=QUIET, f_conf="PCAP_INTF f0;\nUDPSERV_PORT 1;\nMAX_SPA_PACKET_AGE 1;\n"
                 "VERBOSE 1;\n", one="UDPSERV_PORT 2;\nMAX_SPA_PACKET_AGE 2;\nVERBOSE 2;\n"
                 "FWKNOP_RUN_DIR /run/one;\n", two="MAX_SPA_PACKET_AGE 3;\nVERBOSE 3;\n"
                 "DIGEST_FILE $FWKNOP_RUN_DIR/d;\n")
        both = ",".join([self.place("one"), self.place("two")])
        for option in (["-O", both], ["--override-config=" + both]):
            found = self.read("-v", *option).settings
            self.assertEqual(("f0", 2, 3, 1, "/run/one/d"),
                             (found.interface, found.udp_port, found.max_packet_age,
                              found.verbose, found.digest_file))

    def test_bad_files(self) -> None:
        """Are named with the line; one that is missing stops the start."""
        self.put(a_conf=QUIET, f_conf="", one="\nMAX_SPA_PACKET_AGE soon;\n", two="VERBOS 1;\n")
        self.assertIn("one:2: MAX_SPA_PACKET_AGE: expected", self.refusal("-O", self.place("one")))
        self.assertEqual("two:1: VERBOS: unknown directive, expected VERBOSE",
                         self.refusal("-O", self.place("two")))
        self.assertEqual("three: No such file or directory",
                         self.refusal("-O", self.place("three")))
        self.assertEqual(3, self.main("-c", self.place("f.conf"), "-O", self.place("x"), "-S")[0])


# ------------------------------------------------------------------- fwknopd's own words

# All directives in fwknopd(8) and in the comments and lines of the two files that Debian ships.
MAN_SERVER = """
ACCESS_FILE DIGEST_DB_FILE DIGEST_FILE ENABLE_DESTINATION_RULE ENABLE_DIGEST_PERSISTENCE
ENABLE_EXTERNAL_CMDS ENABLE_EXT_CMD_PREFIX ENABLE_FIREWD_COMMENT_CHECK ENABLE_FIREWD_FORWARDING
ENABLE_FIREWD_LOCAL_NAT ENABLE_FIREWD_OUTPUT ENABLE_FIREWD_SNAT ENABLE_IPT_COMMENT_CHECK
ENABLE_IPT_FORWARDING ENABLE_IPT_LOCAL_NAT ENABLE_IPT_OUTPUT ENABLE_IPT_SNAT ENABLE_NAT_DNS
ENABLE_NFQ_CAPTURE ENABLE_PCAP_ANY_DIRECTION ENABLE_PCAP_PROMISC ENABLE_RULE_PREPEND
ENABLE_SPA_OVER_HTTP ENABLE_SPA_PACKET_AGING ENABLE_TCP_SERVER ENABLE_UDP_SERVER
ENABLE_X_FORWARDED_FOR EXIT_AT_INTF_DOWN EXTERNAL_CMD_ALARM EXTERNAL_CMD_CLOSE EXTERNAL_CMD_OPEN
EXT_CMD_PREFIX FIREWALL_EXE FIREWD_DNAT_ACCESS FIREWD_FORWARD_ACCESS FIREWD_INPUT_ACCESS
FIREWD_MASQUERADE_ACCESS FIREWD_OUTPUT_ACCESS FIREWD_SNAT_ACCESS FLUSH_FIREWD_AT_EXIT
FLUSH_FIREWD_AT_INIT FLUSH_IPFW_AT_EXIT FLUSH_IPFW_AT_INIT FLUSH_IPT_AT_EXIT FLUSH_IPT_AT_INIT
FWKNOP_CONF_DIR FWKNOP_PID_FILE FWKNOP_RUN_DIR GPG_EXE GPG_HOME_DIR IPFW_ACTIVE_SET_NUM
IPFW_ADD_CHECK_STATE IPFW_EXPIRE_PURGE_INTERVAL IPFW_EXPIRE_SET_NUM IPFW_MAX_RULES
IPFW_START_RULE_NUM IPT_DNAT_ACCESS IPT_FORWARD_ACCESS IPT_INPUT_ACCESS IPT_MASQUERADE_ACCESS
IPT_OUTPUT_ACCESS IPT_SNAT_ACCESS LOCALE MAX_SNIFF_BYTES MAX_SPA_PACKET_AGE NFQ_INTERFACE NFQ_PORT
NFQ_CHAIN NFQ_QUEUE_NUMBER NFQ_TABLE
PCAP_DISPATCH_COUNT PCAP_FILE PCAP_FILTER PCAP_INTF PCAP_LOOP_SLEEP
PF_ANCHOR_NAME PF_EXPIRE_INTERVAL RULES_CHECK_THRESHOLD SNAT_TRANSLATE_IP SUDO_EXE SYSLOG_FACILITY
SYSLOG_IDENTITY TCPSERV_PORT UDPSERV_PORT UDPSERV_SELECT_TIMEOUT VERBOSE ACCESS_FOLDER
CMD_EXEC_TIMEOUT ALLOW_ANY_USER_AGENT ALLOW_LEGACY_ACCESS_REQUESTS
""".split()
MAN_ACCESS = """
ACCESS_EXPIRE ACCESS_EXPIRE_EPOCH CMD_CYCLE_CLOSE CMD_CYCLE_OPEN CMD_CYCLE_TIMER CMD_EXEC_GROUP
CMD_EXEC_USER CMD_SUDO_EXEC_GROUP CMD_SUDO_EXEC_USER DESTINATION DISABLE_DNAT ENABLE_CMD_EXEC
ENABLE_CMD_SUDO_EXEC ENCRYPTION_MODE FORCE_MASQUERADE FORCE_NAT FORCE_SNAT FORWARD_ALL
FW_ACCESS_TIMEOUT GPG_ALLOW_NO_PW GPG_DECRYPT_ID GPG_DECRYPT_PW GPG_DISABLE_SIG GPG_EXE
GPG_FINGERPRINT_ID GPG_HOME_DIR GPG_IGNORE_SIG_VERIFY_ERROR GPG_REMOTE_ID GPG_REQUIRE_SIG
HMAC_DIGEST_TYPE HMAC_KEY HMAC_KEY_BASE64 KEY KEY_BASE64 MAX_FW_TIMEOUT OPEN_PORTS REQUIRE_SOURCE
REQUIRE_SOURCE_ADDRESS REQUIRE_USERNAME RESTRICT_PORTS SOURCE
""".split()
NO_DIRECTIVES = set("""
FWKNOP_FORWARD FWKNOP_INPUT FWKNOP_OUTPUT LC_ALL PKT_SRC SHA3_256 SHA3_512 CLIENT_TIMEOUT
FWKNOP_PREROUTING FWKNOP_POSTROUTING FWKNOP_MASQUERADE LOG_DAEMON
""".split())  # chains, variables, digests in the same spelling
# Options of `fwknopd --help`; -A, a mode for fuzzing, is only in a build of its own.
MAN_OPTIONS = """
access-file access-folder config-file foreground interface digest-file dump-config kill locale
override-config pid-file pcap-filter restart rotate-digest-cache run-dir status test udp-server
verbose syslog-enable version help dump-serv-err-codes exit-parse-config exit-parse-digest-cache
fault-injection-tag fw-list fw-list-all fw-flush gpg-home-dir gpg-exe sudo-exe
no-firewd-check-support no-ipt-check-support key-gen key-gen-file key-len hmac-key-len
hmac-digest-type
""".split()
MAN_LETTERS = "acdDfhiKlOpPRrStUvV"


class ManualTest(FilesCase):
    """Nothing that fwknop's manual names is unknown here."""

    def test_every_directive_has_a_row(self) -> None:
        """Supported, or ignored or refused with a reason that says more than "not yet"."""
        for names, table in ((MAN_SERVER, server.ServerSettings), (MAN_ACCESS, server.Stanza)):
            for name in names:
                with self.subTest(name=name):
                    row = table.row(name)
                    assert row is not None
                    self.assertGreater(len(row.help), 3)

    def test_every_option(self) -> None:
        """By its long name and its letter."""
        self.assertEqual(set(), set(MAN_OPTIONS) - {each.long for each in server.OPTIONS})
        self.assertEqual(set(), set(MAN_LETTERS) - {each.short for each in server.OPTIONS})
        for option in server.OPTIONS:
            self.assertTrue(option.help, option.long)

    @needs_programs("fwknopd", "man")
    def test_the_manual_names_no_other(self) -> None:
        """The lists above are complete; a machine for containers may leave manuals out."""
        text = re.sub(".\b", "", run(["man", "fwknopd"]).stdout)
        if not text:
            skip("the manual of fwknopd is not installed", live=True)
        self.assertGreater(self.check_names(text), 60)

    def check_names(self, text: str) -> int:
        """Return how many directives a text names; all have to be in the lists above."""
        found = set(re.findall(r"\b[A-Z][A-Z0-9]*_[A-Z0-9_]+\b", text))
        self.assertEqual(set(), found - set(MAN_SERVER) - set(MAN_ACCESS) - NO_DIRECTIVES)
        return len(found)

    @needs_root
    @needs_programs("fwknopd", "dpkg-query")
    def test_the_shipped_files(self) -> None:
        """As are those of Debian's package, whose examples are lines as we read them. A file that
        was changed since is the administrator's, and not read.
        """
        conffiles = run(["dpkg-query", "-W", "-f", "${Conffiles}", "fwknop-server"]).stdout
        for name, directives, lines in (("fwknopd.conf", 60, 40), ("access.conf", 3, 2)):
            path = "/etc/fwknop/" + name
            with open(path, "rb") as file:
                data = file.read()
            if "%s %s" % (path, hashlib.md5(data).hexdigest()) not in conffiles:
                skip(path + " is not as the package has it", live=True)
            text = data.decode("latin-1")
            names = re.findall(r"(?m)^#?[A-Z][A-Z0-9_]{3,}\s", text)
            self.assertGreater(self.check_names("".join(names)), directives)
            text = re.sub(r"(?m)^#(?=[A-Z_]{3,}:?[ \t]+\S)", "", text)
            found = list(server.read_lines(self.write("x", text), True))
            self.assertGreater(len(found), lines)

    @needs_programs("fwknopd")
    def test_help_names_no_other(self) -> None:
        """The options above are all of fwknopd's, but for those of capture."""
        found = set(re.findall(r"--([a-z][a-z-]+)", run(["fwknopd", "-h"]).stdout))
        self.assertGreater(len(found), 25)
        self.assertEqual({"packet-limit", "pcap-file", "pcap-any-direction", "afl-fuzzing"},
                         found - set(MAN_OPTIONS))


@needs_programs("fwknopd")
class PeerTest(FilesCase):
    """The real fwknopd reads the same files."""

    def peer(self, *options: str) -> Any:
        """Return what its dump says: exit code and the SOURCE of each stanza."""
        answer = run(["fwknopd", "-f", "-D", "-r", self.place("run"), "-c", self.place("f.conf"),
                      "-a", self.place("a.conf"), *options], cwd=self.directory)
        said = answer.stdout + answer.stderr
        return answer.returncode, re.findall(r"(?m)^SOURCE \(\d+\):  (.*)$", said), said

    def test_stanzas(self) -> None:
        """The same ones, by every way of including; a folder's it has in no order."""
        self.put(f_conf="PCAP_INTF lo;\n", sub__b=stanza("2.2.2.2", "%include c", "OPEN_PORTS "
                 "tcp/2"), c=stanza("3.3.3.3"), d__x_conf=stanza("4.4.4.4"), keys="KEY k\n",
                 d__y_conf=stanza("5.5.5.5"), d__z="junk\n")
        for text, options in (
                (stanza("1.1.1.1", "%include sub/b", "OPEN_PORTS tcp/1"), ()),
                ("%include sub/b\n%include c\n%include c\n", ()),
                (stanza("1.1.1.1", "%include_folder HERE/d") + stanza("6.6.6.6"), ()),
                (stanza("1.1.1.1", "%include_keys keys"), ()),
                (stanza("1.1.1.1"), ("--access-folder", self.place("d")))):
            self.put(a_conf=text)
            code, sources, said = self.peer(*options)
            with self.subTest(text=text, options=options):
                self.assertEqual(0, code, said)
                self.assertEqual(sorted(sources), sorted(self.sources(*options)), said)
                if "folder" not in text + "".join(options):
                    self.assertEqual(sources, self.sources(*options))
                if "keys" in text:
                    self.assertIn("Including key file: 'keys'", said)

    def test_refusals(self) -> None:
        """What it does not take we do not take either, in its words."""
        self.put(f_conf="PCAP_INTF lo;\n", b=stanza("2.2.2.2", "%include HERE/c"),
                 c=stanza("3.3.3.3", "%include HERE/d"), d=stanza("4.4.4.4"))
        for text in (stanza("ANY", "%include HERE/b"), stanza("ANY", "%include HERE/none"),
                     stanza("ANY", "%include HERE/a.conf")):
            self.put(a_conf=text)
            code, _, said = self.peer()
            self.assertEqual(1, code, said)
            words = re.search(r"(?m)^\[\*\] (.*)$", said)
            assert words, said
            self.assertIn(words.group(1).replace(self.directory + "/", ""), self.refusal())


# ------------------------------------------------------------------- small options


class OptionTest(FilesCase):
    """Options that do one thing, or nothing."""

    def test_keys(self) -> None:
        """fwknopd's two lines, of the lengths that were asked for, other ones each time."""
        lengths = []
        for options in ([], ["--key-len", "16", "--hmac-key-len", "33"],
                        ["--hmac-digest-type", "sha512"], []):
            code, out, err = self.main("--key-gen", *options)
            self.assertEqual((0, ""), (code, err))
            found = re.match(r"KEY_BASE64: (\S+)\nHMAC_KEY_BASE64: (\S+)\n\Z", out)
            assert found, out
            lengths.append([len(server.decode_base64(each.rstrip("=").encode()))
                            for each in found.groups()])
            stanza_of_it = "SOURCE ANY\n" + out
            self.put(a_conf=stanza_of_it, f_conf="")
            self.assertEqual(["ANY"], self.sources())
        self.assertEqual([[32, 64], [16, 33], [32, 128], [32, 64]], lengths)
        self.assertNotEqual(self.main("--key-gen")[1], self.main("--key-gen")[1])

    def test_keys_in_a_file(self) -> None:
        """A new one for its owner alone; fwknopd's is for all, and replaces one that is there."""
        path = self.place("keys")
        code, out, _err = self.main("--key-gen", "--key-gen-file", path)
        self.assertEqual((0, "[+] Wrote Rijndael and HMAC keys to: %s\n" % path), (code, out))
        self.assertEqual(0o600, stat.S_IMODE(os.stat(path).st_mode))
        with open(path) as file:
            before = file.read()
        self.assertRegex(before, r"^KEY_BASE64: \S+\nHMAC_KEY_BASE64: \S+\n$")
        code, out, err = self.main("--key-gen", "--key-gen-file", path)
        self.assertEqual((1, ""), (code, out))
        self.assertIn("File exists", err)
        with open(path) as file:
            self.assertEqual(before, file.read())

    def test_wrong_lengths(self) -> None:
        """Are a wrong command line, and print no key."""
        for options in (["--key-len", "0"], ["--key-len", "33"], ["--hmac-key-len", "129"],
                        ["--hmac-digest-type", "crc"], ["--key-len", "x"]):
            code, out, err = self.main("--key-gen", *options)
            self.assertEqual((2, ""), (code, out))
            self.assertIn("--key-gen: expected", err)

    def test_ignored_options(self) -> None:
        """Are taken, and change nothing."""
        plain = self.main_with(QUIET, "", "-D")
        for options in (["-l", "C"], ["--locale=nowhere"], ["--no-ipt-check-support"],
                        ["--no-firewd-check-support"], ["--fault-injection-tag", "x"]):
            self.assertEqual(plain, self.main_with(QUIET, "", "-D", *options))

    def test_error_codes(self) -> None:
        """Those that the log can name, with its words."""
        code, out, _err = self.main("--dump-serv-err-codes")
        self.assertEqual(0, code)
        for payload in (b"x", b"!" * 200, b"U2FsdGVkX1" + b"A" * 200):
            with self.assertRaises(server.PacketRejected) as caught:
                server.check_payload(payload)
            found = re.search(r"error (\d+: '.*') for", str(caught.exception))
            assert found, str(caught.exception)
            self.assertIn("err code: " + found.group(1).replace(": '", ", err string: '"), out)

    def test_digest_cache(self) -> None:
        """Is read and said to be good, and not touched; lines that are none are counted."""
        path = self.place("run/digest.cache")
        for text, said in (("", ""), ("# c\nabc 17 1.1.1.1 1 1.1.1.1 1 5\n", ""),
                           ("bad line\nabc 17 1.1.1.1 1 1.1.1.1 1 5\n",
                            "Skipping invalid digest file entry")):
            self.put(run__digest=text)
            os.replace(self.place("run/digest"), path)
            code, out, err = self.main_with(QUIET, "", "--exit-parse-digest-cache", "-r",
                                            self.place("run"))
            self.assertEqual((0, "Digest cache parsed, exiting.\n"), (code, out))
            self.assertIn(said, err)
            with open(path) as file:
                self.assertEqual(text, file.read())
        os.unlink(path)
        self.assertEqual(0, self.main_with(QUIET, "", "--exit-parse-digest-cache", "-r",
                                           self.place("run"))[0])
        self.assertEqual([], os.listdir(self.place("run")))
        self.assertEqual(3, self.main_with("", "", "--exit-parse-digest-cache")[0])


if __name__ == "__main__":
    unittest.main()
