"""keygen.py: --rotate and --retire, and life without POSIX."""

import base64
import os
import re
import subprocess
import sys
import unittest
from typing import Any, List, Tuple
from unittest import mock

import keygen
import spa_server as server
from tests.support import TOP, needs_programs, run
from tests.test_keygen import RELOAD, SCRIPT, WORK, FileTestCase, all_at_once, call_all, counted
from tests.test_packet import is_authentic


# What people make of their files: other stanzas, other spellings, remarks everywhere.
ACCESS = """\
# The doors of gate. \u00c5ngstr\u00f6m, \u2026
SOURCE: 192.0.2.0/24;
KEY first stanza
HMAC_KEY of another   # this belongs to the key

  #  Work\t
; the laptop of joe
SOURCE          ANY ; # everywhere
OPEN_PORTS      tcp/22
KEY_BASE64:\tb2xkIGtleQ==;   # made in March
# not with this port: OPEN_PORTS tcp/80

HMAC_DIGEST_TYPE sha512;
HMAC_KEY_BASE64 b2xkIEhNQUMga2V5;
REQUIRE_SOURCE_ADDRESS Y
# ---- the others ----

# joe
SOURCE 198.51.100.1
KEY_BASE64 am9l
HMAC_KEY_BASE64 am9lJ3M=
"""
RC = """\
[default]
HMAC_DIGEST_TYPE SHA256
# work is gate

[Work] ; at gate
ACCESS tcp/22   # ssh
SPA_SERVER gate.example
KEY_BASE64 b2xkIGtleQ==   # made in March
HMAC_DIGEST_TYPE SHA512 ; as the server
HMAC_KEY_BASE64: b2xkIEhNQUMga2V5
; the end of work

[joe]
KEY_BASE64 am9l
HMAC_KEY_BASE64 am9lJ3M=
"""
NEW_KEY = base64.b64encode(b"A" * 32).decode()
NEW_HMAC_KEY = base64.b64encode(b"B" * 128).decode()
OLD = ("b2xkIGtleQ==", "b2xkIEhNQUMga2V5")


class RotateTestCase(FileTestCase):
    """A test with an rc file and an access file."""

    def setUp(self) -> None:
        """Write both."""
        super().setUp()
        self.rc = self.path("rc", RC)
        self.access = self.path("access", ACCESS)
        self.both = ["--access-file", self.access, "--rc-file", self.rc]

    def texts(self) -> Tuple[str, str]:
        """Return what both files say."""
        return self.read(self.rc), self.read(self.access)

    def rotate(self, *more: str, random: Any = None) -> str:
        """Rotate the keys in both files, or those of `more`, and return standard output."""
        code, out, err = call_all("--rotate", "work", *(more or self.both), random=random)
        self.assertEqual(0, code, err)
        return out

    def retire(self) -> str:
        """Retire the old keys, and return standard error."""
        code, out, err = call_all("--retire", "work", "--access-file", self.access)
        self.assertEqual((0, ""), (code, out), err)
        return err

    def packet(self, rc: str) -> bytes:
        """Return a packet of spa_client.py for [work] of an rc file."""
        answer = run([sys.executable, os.path.join(TOP, "spa_client.py"), "-T", "-n", "work",
                      "-a", "192.0.2.7", "--rc-file", rc])
        self.assertEqual(0, answer.returncode, answer.stderr)
        return bytes(re.findall(r"Final SPA Data: (\S+)", answer.stdout)[0].encode())

    def opened_by(self, packet: bytes) -> List[int]:
        """Return the numbers of the stanzas that our server finds a packet to be for."""
        stanzas, _ = server.read_stanzas(self.access)
        numbers = []
        for stanza in stanzas:
            assert stanza.keys is not None
            if is_authentic(packet, stanza.keys):
                opened, _ = server.unlock(packet, stanza.keys)
                self.assertEqual("192.0.2.7", str(opened.address))
                numbers.append(stanza.number)
        return numbers


class RotateTest(RotateTestCase):
    """New keys beside the old ones, and the end of these."""

    def test_both_keys_open_until_the_old_one_is_retired(self) -> None:
        """With the real reading of our server, and packets of our client."""
        old_rc = self.path("old", RC)
        self.assertEqual([2], self.opened_by(self.packet(old_rc)))
        self.assertEqual("", self.rotate())
        self.assertEqual([2], self.opened_by(self.packet(self.rc)))
        self.assertEqual([3], self.opened_by(self.packet(old_rc)))
        self.assertEqual(f"[+] Removed the old keys of work from: {self.access}\n{RELOAD}",
                         self.retire())
        self.assertEqual([2], self.opened_by(self.packet(self.rc)))
        self.assertEqual([], self.opened_by(self.packet(old_rc)))

    def test_nothing_but_keys_changes(self) -> None:
        """Other lines stay byte for byte; after --retire, nothing of the old stanza is left."""
        self.rotate(random=counted())
        rc, access = self.texts()
        self.assertEqual(RC.replace(
            f"KEY_BASE64 {OLD[0]}   #", f"KEY_BASE64                  {NEW_KEY}   #").replace(
            f"HMAC_KEY_BASE64: {OLD[1]}", f"HMAC_KEY_BASE64             {NEW_HMAC_KEY}"), rc)
        expected = ACCESS.replace(
            f"KEY_BASE64:\t{OLD[0]};", f"KEY_BASE64                  {NEW_KEY};").replace(
            f"HMAC_KEY_BASE64 {OLD[1]};", f"HMAC_KEY_BASE64             {NEW_HMAC_KEY};")
        begin, end = ACCESS.index("; the laptop"), ACCESS.index("# ---- the others")
        place = expected.index("# ---- the others")
        self.assertEqual(expected[:place] + "\n# old work\n# (until keygen.py --retire work)\n"
                         + ACCESS[begin:end] + expected[place:], access)
        self.retire()
        self.assertEqual((rc, expected), self.texts())

    def test_every_line_end(self) -> None:
        """CRLF, and a last line without an end."""
        for rc, access in ((RC.replace("\n", "\r\n"), ACCESS.replace("\n", "\r\n")),
                           (RC.rstrip(), ACCESS.rstrip()),
                           (RC.partition("; the end")[0].rstrip(),
                            ACCESS.partition("# ----")[0].rstrip())):
            self.path("rc", rc)
            self.path("access", access)
            self.rotate()
            self.assertEqual([2], self.opened_by(self.packet(self.rc)))
            self.assertEqual([3], self.opened_by(self.packet(self.path("old", rc))))
            self.retire()
            self.assertEqual([2], self.opened_by(self.packet(self.rc)))
            self.assertNotIn(OLD[0], self.texts()[1])
            self.assertEqual(len(access.split("\n")), len(self.texts()[1].split("\n")))

    def test_files_of_our_own(self) -> None:
        """Rotate stanzas that keygen.py appended, with other stanzas after them."""
        rc, access = self.path("my-rc"), self.path("my-access")
        files = ["--rc-file", rc, "--access-file", access]
        for name in ("home", "work", "lab"):
            self.assertEqual(0, call_all(name, *WORK[1:], *files)[0])
        before = self.read(access)
        self.assertEqual(0, call_all("--rotate", "WORK", *files)[0])
        self.assertEqual(0, call_all("more", *WORK[1:], *files)[0])
        self.assertEqual(["# home", "# work", "# old WORK", "# (until keygen.py --retire WORK)",
                          "# lab", "# more"], re.findall("^#.*", self.read(access), re.M))
        self.access = access
        self.retire()
        self.assertEqual(len(before.split("\n")), self.read(access).rpartition("\n\n#")[0].count(
            "\n") + 2)
        self.assertEqual([2], self.opened_by(self.packet(rc)))

    def test_again_only_after_retire(self) -> None:
        """Else the keys that clients may still have would be lost."""
        self.rotate()
        before = self.texts()
        code, out, err = call_all("--rotate", "work", *self.both)
        self.assertEqual((3, "", before), (code, out, self.texts()))
        self.assertEqual(f"keygen.py: {self.access}: has # old work in line 17: --retire work "
                         "when all its clients have the new keys\n", err)
        self.retire()
        self.rotate()
        self.assertEqual([2], self.opened_by(self.packet(self.rc)))

    def test_what_an_editor_did_meanwhile(self) -> None:
        """The old stanza moved to the end, spelt otherwise, with remarks and one line more."""
        self.rotate()
        text = self.texts()[1]
        begin, end = text.index("# old work"), text.index("# ---- the others")
        old = "  #   Old  WORK \n\n# remark\n" + "\n\n".join(text[begin:end].split("\n")[2:])
        self.path("access", (text[:begin] + text[end:] + "\n" + old + "MAX_FW_TIMEOUT 60\n")
                  .encode("utf-8"))
        self.assertEqual([4], self.opened_by(self.packet(self.path("old", RC))))
        code, _, err = call_all("--rotate", "work", *self.both)
        self.assertEqual(3, code, err)
        self.retire()
        self.assertEqual(text[:begin].rstrip(), self.texts()[1].partition("# ----")[0].rstrip())
        self.assertEqual([2], self.opened_by(self.packet(self.rc)))
        self.assertNotIn(OLD[0], self.texts()[1])

    def test_raw_keys(self) -> None:
        """KEY and HMAC_KEY, whose values may have blanks, become base64."""
        self.path("access", "# work\nSOURCE ANY\nKEY my old key ; # x\nHMAC_KEY a # b\n")
        self.path("rc", "[work]\nKEY my-old-key\nHMAC_KEY older\n")
        self.rotate(random=counted())
        rc, access = self.texts()
        hmac_key = base64.b64encode(b"B" * 64).decode()
        keys = f"KEY_BASE64                  {NEW_KEY}\nHMAC_KEY_BASE64             {hmac_key}\n"
        self.assertEqual("[work]\n" + keys, rc)
        self.assertEqual(
            "# work\nSOURCE ANY\n" + keys.rstrip() + "\n\n# old work\n# (until keygen.py --retire "
            "work)\nSOURCE ANY\nKEY my old key ; # x\nHMAC_KEY a # b\n", access)

    def test_lengths(self) -> None:
        """As the stanza's digest wants it, or as said."""
        for digest, more, lengths in (
                ("MD5", [], (32, 16)), ("sha384", [], (32, 128)), ("SHA3_256", [], (32, 64)),
                ("sha1", ["--key-len", "16", "--hmac-key-len", "100"], (16, 100))):
            self.path("access", ACCESS.replace("sha512;", digest))
            self.path("rc", RC.replace("SHA512 ;", digest + " ;"))
            self.rotate(*self.both, *more)
            stanzas, _ = server.read_stanzas(self.access)
            texts = stanzas[1].texts
            self.assertEqual(lengths, tuple(len(base64.b64decode(texts[name])) for name in
                                            ("KEY_BASE64", "HMAC_KEY_BASE64")))

    def test_one_file(self) -> None:
        """The keys are printed for the other one, in the form that both take."""
        printed = ("# The new keys of work, for its stanza in the other file%s\n"
                   f"KEY_BASE64: {NEW_KEY}\nHMAC_KEY_BASE64: {NEW_HMAC_KEY}\n")
        for option, path in (("--access-file", self.access), ("--rc-file", self.rc)):
            before = self.texts()
            then = ", access.conf: then spa_server.py -R" if path == self.rc else ""
            self.assertEqual(printed % then, self.rotate(option, path, random=counted()))
            self.assertEqual([path == self.rc, path == self.access],
                             [old != new for old, new in zip(before, self.texts())])
        self.assertEqual([2], self.opened_by(self.packet(self.rc)))

    def test_byte_order_mark(self) -> None:
        """Windows begins a text with one: the stanza behind it is found."""
        keys = "KEY_BASE64 aw==\nHMAC_KEY_BASE64 aA==\n"
        self.path("rc", "\ufeff[Work]\n" + keys)
        self.path("access", "\ufeff# work\nSOURCE ANY\n" + keys)
        self.assertEqual("", self.rotate())
        self.assertIn("has a stanza [work] already, in line 1", call_all(
            *WORK, "--rc-file", self.rc)[2])

    def test_qr_of_the_new_keys(self) -> None:
        """For the phone, also when nothing else is printed."""
        out = self.rotate(*self.both, "--qr")
        self.assertEqual(1, out.count("KEY_BASE64 and HMAC_KEY_BASE64 for a phone"))
        self.assertNotIn("KEY_BASE64:", out)
        self.assertGreater(out.count("\033[0m\n"), 28)

    @needs_programs("fwknopd")
    def test_fwknopd_reads_both_stanzas(self) -> None:
        """The real server takes the file in between, too."""
        access = self.path("my-access")
        self.assertEqual(0, call_all(*WORK, "--access-file", access)[0])
        self.rotate("--access-file", access)
        said = self.fwknopd_reads(access)
        self.assertEqual(["1", "2"], re.findall(r"SOURCE \((\d)\):", said))
        self.assertEqual(2, said.count("OPEN_PORTS: tcp/22"), said)


class RefusedTest(RotateTestCase):
    """An impossible task is one line, and changes nothing."""

    def check(self, code: int, expected: str, *arguments: str) -> None:
        """Run keygen.py, which has to fail so, and look at both files and at what it says."""
        before = self.texts(), sorted(os.listdir(self.directory))
        found, out, err = call_all(*arguments)
        self.assertEqual((code, ""), (found, out), err)
        self.assertRegex(err, r"\Akeygen\.py: [^\n]+\n\Z")
        self.assertIn(expected, err)
        for secret in OLD + ("am9l", "first stanza", "hunter2"):
            self.assertNotIn(secret, err)
        self.assertEqual(before, (self.texts(), sorted(os.listdir(self.directory))))

    def test_command_lines(self) -> None:
        """--rotate and --retire take what belongs to them."""
        for expected, arguments in (
                ("--rotate needs --access-file", ["--rotate", "work"]),
                ("--retire needs --access-file", ["--retire", "work"]),
                ("--retire takes --access-file and nothing else",
                 ["--retire", "work", "--rc-file", self.rc]),
                ("nothing else", ["--retire", "work", *self.both]),
                ("nothing else", ["--retire", "work", "--access-file", self.access, "--qr"]),
                ("nothing else", ["--retire", "work", "--access-file", self.access,
                                  "--key-len", "32"]),
                ("--rotate takes --access-file --rc-file --qr --key-len --hmac-key-len and nothing",
                 ["--rotate", "work", "--retire", "work", *self.both]),
                ("nothing else", ["work", "--rotate", "work", *self.both]),
                ("nothing else", ["--rotate", "work", "--port", "1", *self.both]),
                ("nothing else", ["--rotate", "work", *self.both, "--hmac-digest-type", "md5"]),
                ("two files", ["--rotate", "work", "--access-file", self.rc, "--rc-file", self.rc]),
                ("--rotate: expected a name", ["--rotate", "a b", *self.both]),
                ("[default]", ["--rotate", "default", *self.both]),
                ("--retire: expected one argument", ["--retire"]),
                ("expected a path", ["--rotate", "work", "--rc-file", ""])):
            with self.subTest(arguments):
                self.check(2, expected, *arguments)

    def test_access_files(self) -> None:
        """A stanza that is not there, or not clear, or without keys of its own."""
        key, hmac_key = f"KEY_BASE64:\t{OLD[0]};", f"HMAC_KEY_BASE64 {OLD[1]};"
        mark = "  #  Work\t\n"
        for expected, text in (
                ("expected one line # work, found none", ACCESS.replace(mark, "")),
                ("expected one line # work, found none", ""),
                ("expected one line # work, found 2", ACCESS + mark + "SOURCE ANY\n"),
                ("expected SOURCE to follow # work of line 6",
                 ACCESS.replace("SOURCE          ANY ; # everywhere\n", "")),
                ("expected SOURCE to follow # work of line 1", "# work\n# SOURCE ANY\n"),
                ("expected one KEY_BASE64 (or KEY) in the stanza #  Work", ACCESS.replace(key, "")),
                ("expected one KEY_BASE64 (or KEY)", ACCESS.replace(key, key + "\nKEY hunter2")),
                ("expected one HMAC_KEY_BASE64 (or HMAC_KEY)", ACCESS.replace(hmac_key, "")),
                ("expected one KEY_BASE64 (or KEY)", "# work\nSOURCE ANY\n%include keys\n"),
                ("expected HMAC_DIGEST_TYPE md5, sha1", ACCESS.replace("sha512", "hunter2")),
        ):
            with self.subTest(expected):
                self.path("access", text)
                self.check(3, expected, "--rotate", "work", *self.both)
                self.check(3, "expected one line # old work, found none",
                           "--retire", "work", "--access-file", self.access)

    def test_rc_files(self) -> None:
        """The same for the client's; access.conf stays as it is, too."""
        for expected, text in (
                ("expected one line [work], found none", RC.replace("[Work]", "[worker]")),
                ("expected one line [work], found none", RC.replace("[Work]", "[Work")),
                ("expected one line [work], found 2", RC + "[work]\n"),
                ("expected one KEY_BASE64 (or KEY) in the stanza [Work]",
                 RC.replace("KEY_BASE64 b2", "KEY_FILE b2")),
                ("expected one HMAC_KEY_BASE64", RC.replace("HMAC_KEY_BASE64:", "#HMAC_KEY")),
                ("expected HMAC_DIGEST_TYPE", RC.replace("SHA512 ;", ";"))):
            with self.subTest(expected):
                self.path("rc", text)
                self.check(3, expected, "--rotate", "work", *self.both)

    def test_old_marks(self) -> None:
        """Two old stanzas, or one that has lost its SOURCE line, are left to their owner."""
        for text, expected in (
                ("# old work\nSOURCE ANY\n" * 2, "found 2"),
                ("# old work\nKEY hunter2\n", "expected SOURCE to follow # old work")):
            self.path("access", text)
            self.check(3, expected, "--retire", "work", "--access-file", self.access)

    def test_files_that_are_none(self) -> None:
        """A missing file is not made by --rotate; exit code 1 as for every file."""
        for path in (self.path("missing"), self.path("no/where"), self.directory, "/dev/null"):
            with self.subTest(path):
                top = os.path.dirname(path)
                self.check(1, top, "--rotate", "work", "--access-file", self.access,
                           "--rc-file", path)
                self.check(1, top, "--retire", "work", "--access-file", path)


class FilesTest(RotateTestCase):
    """Owners, modes, links, crashes, and others who write at the same time."""

    def test_modes_and_links_stay(self) -> None:
        """A group that may read is the administrator's wish; there is a warning."""
        os.mkdir(self.path("dots"))
        target = self.path("dots/rc", RC)
        os.unlink(self.rc)
        os.symlink("dots/rc", self.rc)
        os.chmod(self.access, 0o640)
        code, _, err = call_all("--rotate", "work", *self.both)
        self.assertEqual(0, code)
        self.assertIn(f"{self.access} is open to others (mode 0640)", err)
        self.assertEqual((0o640, 0o600, True), (self.mode(self.access), self.mode(target),
                                                os.path.islink(self.rc)))
        self.assertEqual(["rc"], os.listdir(self.path("dots")))

    def test_a_crash_between_the_files_locks_nobody_out(self) -> None:
        """access.conf is first, and has the keys that the rc file still has."""
        real, calls = os.replace, []

        def replace_once(source: str, target: str, **more: int) -> None:
            calls.append(self.path(target))
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            real(source, target, **more)
        with mock.patch.object(os, "replace", replace_once):
            code, _, err = call_all("--rotate", "work", *self.both)
        self.assertEqual((1, [self.access, self.rc]), (code, calls))
        self.assertIn(f"{self.rc}: No space left on device", err)
        self.assertEqual(RC, self.texts()[0])
        self.assertEqual([3], self.opened_by(self.packet(self.rc)))
        self.assertEqual(["access", "rc"], sorted(os.listdir(self.directory)))

    def test_an_editor_that_saves_meanwhile_wins(self) -> None:
        """It knows nothing of locks; what it wrote is not overwritten."""
        real = keygen.write_out

        def save(text: str) -> None:
            self.path("access", "# saved\n")
            real(text)
        with mock.patch.object(keygen, "write_out", save):
            code, _, err = call_all("--rotate", "work", *self.both)
        self.assertEqual((1, (RC, "# saved\n")), (code, self.texts()))
        self.assertEqual(f"keygen.py: {self.access}: was changed by somebody else meanwhile, and "
                         "left as it is\n", err)

    @unittest.skipUnless(os.path.exists("/dev/full"), "there is no /dev/full")
    def test_nobody_reads_what_it_says(self) -> None:
        """Both files have the new keys though standard error can't be written."""
        with open("/dev/full", "w") as full:
            self.assertEqual(0, subprocess.call(
                [sys.executable, SCRIPT, "--rotate", "work", *self.both], stderr=full,
                env={}))
        self.assertEqual([2], self.opened_by(self.packet(self.rc)))

    def test_many_at_once(self) -> None:
        """One of four runs rotates one name; four runs rotate four names."""
        self.assertEqual([0, 3, 3, 3], all_at_once([["--rotate", "work", *self.both]] * 4))
        self.assertEqual([2], self.opened_by(self.packet(self.rc)))
        files = ["--rc-file", self.path("my-rc"), "--access-file", self.path("my-access")]
        for number in range(4):
            call_all(f"n{number}", *WORK[1:], *files)
        self.assertEqual([0] * 4, all_at_once([["--rotate", f"n{n}", *files] for n in range(4)]))
        self.assertEqual(4, self.read(files[3]).count("# old n"))
        self.assertEqual(8, len(server.read_stanzas(files[3])[0]))
        self.assertEqual(["access", "my-access", "my-rc", "rc"], sorted(os.listdir(self.directory)))


# What Windows lacks is taken away; a directory cannot be opened, and nothing that is open replaced.
WINDOWS = """
import os, sys
sys.modules["fcntl"] = None
for name in ("fchmod", "fchown", "geteuid", "getuid", "O_NOFOLLOW", "O_DIRECTORY", "getpwuid"):
    if hasattr(os, name):
        delattr(os, name)
real_open, real_replace = os.open, os.replace
def open_file(path, *rest, dir_fd=None):
    assert dir_fd is None
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real_open(path, *rest)
def replace(source, target, **directories):
    assert set(directories.values()) == {None}
    opened = [os.path.realpath("/proc/self/fd/" + fd) for fd in os.listdir("/proc/self/fd")]
    if os.path.realpath(source) in opened or os.path.realpath(target) in opened:
        raise PermissionError(32, "used by another process", target)
    real_replace(source, target)
os.open, os.replace = open_file, replace
script = sys.argv.pop(1)
with open(script, "rb") as stream:
    code = compile(stream.read(), script, "exec")
sys.argv[0] = script
exec(code, {"__name__": "__main__", "__file__": script, "__doc__": ""})
"""


@unittest.skipUnless(os.path.isdir("/proc/self/fd"), "no /proc: open files cannot be listed")
class WindowsTest(RotateTestCase):
    """Everything works without what only POSIX has."""

    def windows(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Run keygen.py so."""
        return run([sys.executable, "-c", WINDOWS, SCRIPT, *arguments])

    def test_all(self) -> None:
        """Append, rotate, retire; no word about modes, which are none there."""
        files = ["--rc-file", self.path("my-rc"), "--access-file", self.path("my-access")]
        for arguments in (WORK + files, ["--rotate", "work", *files],
                          ["--retire", "work", *files[2:]], ["--qr"], ["-V"]):
            answer = self.windows(*arguments)
            self.assertEqual(0, answer.returncode, answer.stderr)
            self.assertNotIn("warning", answer.stderr)
        self.access = files[3]
        self.assertEqual([1], self.opened_by(self.packet(files[1])))
        answer = self.windows("--rotate", "nobody", *files)
        self.assertEqual(3, answer.returncode, answer.stderr)
        self.assertEqual(["access", "my-access", "my-rc", "rc"], sorted(os.listdir(self.directory)))


if __name__ == "__main__":
    unittest.main()
