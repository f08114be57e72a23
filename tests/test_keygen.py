"""keygen.py: its keys, its stanzas, its files, and what fwknop itself says to them."""

import base64
import concurrent.futures
import fcntl
import hashlib
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import unittest
from typing import Any, List, Sequence, Tuple
from unittest import mock

import keygen
import spa_client as client
import spa_server as server
from tests.support import (TOP, DirectoryCase, captured, needs_programs, needs_root,
                           run, run_blocked, write)

SCRIPT = os.path.join(TOP, "keygen.py")
WORK = ["work", "--server", "gate.example", "--access", "tcp/22"]
RELOAD = "[+] Now have the server read its files again: spa_server.py -R\n"


def counted(start: int = 65) -> Any:
    """Return a random source that gives AAA..., then BBB..., and so on."""
    letters = iter(range(start, 256))
    return lambda size: bytes([next(letters)]) * size


def call(*arguments: str, random: Any = None) -> Tuple[int, str, str]:
    """Return exit code, standard output and standard error of main().

    What it says of files that it wrote is left out; test_what_was_written_is_said looks at that.
    """
    code, out, err = call_all(*arguments, random=random)
    return code, out, re.sub(r"(?m)^\[\+\] (Wrote the stanza|Now have the server) .*\n", "", err)


def call_all(*arguments: str, random: Any = None) -> Tuple[int, str, str]:
    """Return exit code, standard output and standard error of main()."""
    return captured(lambda: keygen.main(list(arguments), random or os.urandom))


def program(*arguments: str, encoding: str = "",
            **more: Any) -> "subprocess.CompletedProcess[bytes]":
    """Run the script as a program of its own, whose standard output may have another encoding."""
    more.setdefault("stdout", subprocess.PIPE)
    if encoding:
        more["env"] = {**os.environ, "PYTHONIOENCODING": encoding}
    alone = [] if encoding else ["-I"]  # which would not look at the environment
    return subprocess.run([sys.executable, "-S", *alone, SCRIPT, *arguments],
                          stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60, **more)


def all_at_once(runs: Sequence[Sequence[str]]) -> List[int]:
    """Run programs at the same time, and return their exit codes, sorted."""
    with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
        return sorted(pool.map(lambda words: program(*words).returncode, runs))


def directives(stanza: str) -> List[Tuple[str, str]]:
    """Return names and values of a stanza; each value is in column 29."""
    lines = [line for line in stanza.splitlines() if line and line[0] not in "#["]
    return [(line[:28].rstrip(), line[28:]) for line in lines]


class FileTestCase(DirectoryCase):
    """A test with files."""

    def path(self, name: str, text: Any = None, mode: int = 0o600) -> str:
        """Return the path of a file, which is made when its text is given."""
        return self.place(name) if text is None else write(self.place(name), text, mode)

    def read(self, path: str) -> str:
        """Return what a file says."""
        with open(path, encoding="utf-8", newline="") as stream:
            return stream.read()

    def mode(self, path: str) -> int:
        """Return the permissions of a file."""
        return stat.S_IMODE(os.stat(path).st_mode)

    def fwknopd_reads(self, access: str) -> str:
        """Return what the real server says of an access file, which it has to take."""
        answer = run(["fwknopd", "-D", "--exit-parse-config", "-c", self.path("fwknopd.conf", ""),
                      "-a", access, "-r", self.directory])
        self.assertEqual(0, answer.returncode, answer.stdout + answer.stderr)
        return re.sub(r" {2,}", " ", answer.stdout)


class KeysTest(unittest.TestCase):
    """Two keys, and nothing else."""

    def test_two_lines_as_fwknop_prints_them(self) -> None:
        """32 and 64 bytes, standard base64 with its `=`."""
        code, out, err = call(random=counted())
        self.assertEqual((0, ""), (code, err))
        self.assertEqual("KEY_BASE64: " + base64.b64encode(b"A" * 32).decode() + "\n"
                         "HMAC_KEY_BASE64: " + base64.b64encode(b"B" * 64).decode() + "\n", out)

    def test_keys_differ_from_run_to_run(self) -> None:
        """The default source is not a constant."""
        self.assertNotEqual(call()[1], call()[1])

    def test_lengths(self) -> None:
        """The HMAC key suits its digest; both lengths can be said."""
        for digest, length in (("md5", 16), ("sha1", 20), ("sha256", 64), ("sha384", 128),
                               ("sha512", 128), ("sha3_256", 64), ("SHA3_512", 64)):
            with self.subTest(digest):
                keys = call("--hmac-digest-type", digest)[1].split()
                self.assertEqual(32, len(base64.b64decode(keys[1])))
                self.assertEqual(length, len(base64.b64decode(keys[3])))
        code, out, err = call("--key-len", "16", "--hmac-key-len", "128")
        self.assertEqual([16, 128], [len(base64.b64decode(key)) for key in out.split()[1::2]])
        self.assertEqual((0, ""), (code, err))

    def test_short_keys_are_warned_of(self) -> None:
        """They are made, since fwknop makes them."""
        for option in ("--key-len", "--hmac-key-len"):
            code, _, err = call(option, "15")
            self.assertEqual(0, code)
            self.assertIn("warning", err)

    def test_version_and_hash(self) -> None:
        """The version, and the SHA-256 of the file that runs."""
        with open(SCRIPT, "rb") as stream:
            digest = hashlib.sha256(stream.read()).hexdigest()
        self.assertEqual((0, f"keygen.py {keygen.VERSION}\nsha256 {digest}\n", ""), call("-V"))

    def test_debian_minimal_makes_keys(self) -> None:
        """No module beyond the small ones is needed to make keys, either."""
        answer = run_blocked(SCRIPT, WORK, ["hmac", "secrets", "base64", "tempfile", "_hashlib"])
        self.assertEqual((0, ""), (answer.returncode, answer.stderr))


class StanzaTest(unittest.TestCase):
    """The text of both stanzas."""

    def stanzas(self, *arguments: str) -> List[str]:
        """Return the client's and the server's stanza."""
        code, out, err = call(*WORK, *arguments, random=counted())
        self.assertEqual((0, ""), (code, err))
        return out.split("\n\n")

    def test_defaults(self) -> None:
        """Every directive, in fwknop's order."""
        client, server = self.stanzas()
        key, hmac_key = (base64.b64encode(raw).decode() for raw in (b"A" * 32, b"B" * 64))
        self.assertIn("\n[work]\nACCESS                      tcp/22\n", client)
        self.assertIn("\n# work\nSOURCE                      ANY\n", server)
        self.assertEqual(
            [("ACCESS", "tcp/22"), ("SPA_SERVER", "gate.example"), ("KEY_BASE64", key),
             ("HMAC_DIGEST_TYPE", "SHA256"), ("HMAC_KEY_BASE64", hmac_key), ("USE_HMAC", "Y")],
            directives(client))
        self.assertEqual(
            [("SOURCE", "ANY"), ("OPEN_PORTS", "tcp/22"), ("KEY_BASE64", key),
             ("HMAC_DIGEST_TYPE", "SHA256"), ("HMAC_KEY_BASE64", hmac_key),
             ("FW_ACCESS_TIMEOUT", "30"), ("REQUIRE_SOURCE_ADDRESS", "Y")], directives(server))
        self.assertIn("fwknop -n work -R", client)

    def test_options(self) -> None:
        """Each option is found where it belongs, and the client's and the server's agree."""
        client, server = map(dict, map(directives, self.stanzas(
            "--port", "4000", "--source", "10.1.2.3/8,192.0.2.0/255.255.255.0,2001:db8::/32",
            "--timeout", "60", "--username", "joe", "--any-source", "--answer",
            "--hmac-digest-type", "sha512")))
        self.assertEqual("4000", client["SPA_SERVER_PORT"])
        self.assertEqual("source", client["ALLOW_IP"])
        self.assertEqual("joe", client["SPOOF_USER"])
        self.assertEqual("joe", server["REQUIRE_USERNAME"])
        self.assertEqual("10.0.0.0/8,192.0.2.0/24,2001:db8::/32", server["SOURCE"])
        self.assertEqual("60", server["FW_ACCESS_TIMEOUT"])
        self.assertEqual("N", server["REQUIRE_SOURCE_ADDRESS"])
        self.assertEqual(("Y", False), (server["ANSWER"], "ANSWER" in client))
        for name in ("KEY_BASE64", "HMAC_KEY_BASE64", "HMAC_DIGEST_TYPE"):
            self.assertEqual(client[name], server[name])
        self.assertEqual("SHA512", client["HMAC_DIGEST_TYPE"])

    def test_any_source_is_written_as_fwknop_does(self) -> None:
        """In capitals."""
        self.assertEqual("ANY", dict(directives(self.stanzas("--source", "any")[1]))["SOURCE"])

    def test_ports_are_written_without_leading_zeros(self) -> None:
        """As they are compared by the server."""
        client, server = map(dict, map(directives, self.stanzas("--access", "tcp/022, udp/0053")))
        self.assertEqual(("tcp/22,udp/53",) * 2, (client["ACCESS"], server["OPEN_PORTS"]))

    def test_a_port_that_is_said_is_written(self) -> None:
        """Also 62201, since [default] may say another; what is not said is left to [default]."""
        self.assertNotIn("SPA_SERVER_PORT", "".join(self.stanzas()))
        client, server = self.stanzas("--port", "62201")
        self.assertEqual("62201", dict(directives(client))["SPA_SERVER_PORT"])
        self.assertNotIn("SPA_SERVER_PORT", server)


    def test_a_pass_ends(self) -> None:
        """After a time, or as a day begins; both stanzas and standard error say when."""
        self.assertEqual([1030, 1000 + 1800, 1000 + 8 * 3600, 1000 + 2 * 86400], [
            keygen.parse_expires(text, lambda: 1000.9) for text in ("30s", "30m", "8H", "2d")])
        day = int(time.mktime((2099, 12, 31, 0, 0, 0, 0, 0, -1)))
        code, out, err = call(*WORK, "--expires", "2099-12-31")
        self.assertEqual(0, code)
        self.assertRegex(err, r"\A\[\+\] The pass ends at 2099-12-31 00:00:00 [-+][0-9]{4}\n\Z")
        self.assertEqual(2, out.count("\n# ends" + " " * 22 + err[21:]))
        client, server = map(dict, map(directives, out.split("\n\n")))
        self.assertEqual(str(day), server["ACCESS_EXPIRE_EPOCH"])
        self.assertNotIn("ACCESS_EXPIRE_EPOCH", client)


class WrongOptionTest(unittest.TestCase):
    """A wrong option is one line, exit code 2, and nothing on standard output."""

    def check(self, arguments: List[str], *expected: str) -> None:
        """Run main() and look at what it says."""
        code, out, err = call(*arguments)
        self.assertEqual((2, ""), (code, out), arguments)
        self.assertRegex(err, r"\Akeygen\.py: [^\n]+\n\Z")
        for words in expected:
            self.assertIn(words, err)

    def test_wrong_values(self) -> None:
        """Every value is checked, and the error says which and what was expected."""
        for option, expected, values in (
                ("--access", "expected tcp/PORT", ("", "22", "tcp", "tcp/22,", "icmp/8", "TCP/22",
                                                   "tcp/22,\nudp/53")),
                ("--access", "expected a number, 1 to 65535", (
                    "tcp/0", "tcp/65536", "tcp/22 udp/53", "tcp/", "tcp/x", "tcp/2 2", "tcp/\u0662",
                    "tcp/1000000000000")),
                ("--access", "only once", ("tcp/22,tcp/22", "tcp/22,tcp/022")),
                ("--access", "at most 60", (",".join(f"tcp/{n}" for n in range(100, 120)),)),
                ("--server", "expected a host name", ("", "a b", "a;b", "a#b", "-a", "a\nb", "\xe4",
                                                      "x" * 254, "a/b", "a,b")),
                ("--port", "expected a number, 1 to 65535", ("0", "65536", "x", "", "1.5", "1_0")),
                ("--timeout", "expected a number, 1 to 8388608", ("0", "8388609", "30s")),
                ("--expires", "expected a time such as 30m, 8h or 2d, or a day", (
                    "", "8", "never", "8w", "2026-02-30", "2026-11-28", "12/31/2099", "2099-1")),
                ("--expires", "expected a number, 1 to 99999", ("0h", "-1h", "h", "1.5h",
                                                                "100000d")),
                ("--source", "expected ANY, or networks", (
                    "", "x", "10.0.0.0/33", "10.0.0.1,", "10.0.0.1 10.0.0.2", "fe80::1%a#b",
                    "10.0.0.0/8;", "ANY,ANY")),
                ("--username", "expected a user name", ("", "a b", "a:b", "x" * 30, "a#", "\n")),
                ("--key-len", "expected a number, 1 to 32", ("0", "33", "x")),
                ("--hmac-key-len", "expected a number, 1 to 128", ("0", "129")),
                ("--hmac-digest-type", "expected one of md5 sha1", ("sha", "sha224", "")),
        ):
            for value in values:
                with self.subTest(option=option, value=value):
                    self.check(WORK + [f"{option}={value}"], option, expected)

    def test_wrong_names(self) -> None:
        """A name has to survive in both files and on a shell's command line."""
        for name in ("", "a]", "[a", "a\nb", "a b", "a#", "x" * 65, "-", ".x", "\xe4", "a\x00"):
            with self.subTest(name=name):
                self.check(WORK[1:] + ["--", name], "expected a name")
        self.check(WORK[1:] + ["Default"], "[default] holds the defaults")

    def test_what_belongs_together(self) -> None:
        """Stanzas need a name, a server and an access list; two files are two."""
        for arguments, expected in (
                (["work"], "--server"), (["work", "--server", "x"], "--access"),
                (["work", "--access", "tcp/22"], "--server"), (["--timeout", "3"], "NAME"),
                (["--any-source"], "NAME"), (["--rc-file", "x"], "NAME"), (["--answer"], "NAME"),
                (WORK + ["--rc-file", "x", "--access-file", "./x"], "two files"),
                (WORK + ["more"], "one NAME"), (["--nonsense"], "unknown option --nonsense"),
                (["--expires", "8h"], "NAME"), (["\u2013V"], "'\u2013V': is that dash a hyphen?"),
                (["\u2014rotate=x"], "'\u2014rotate': is that dash a hyphen?"),
                (["\u2013-qr"], "'\u2013-qr': is that dash a hyphen?"), (["\u2013qx"], "a name"),
        ):
            with self.subTest(arguments):
                self.check(arguments, expected)

    def test_a_secret_given_by_mistake_is_not_repeated(self) -> None:
        """An option of fwknop's that takes a key is refused by its name alone."""
        for arguments in (["--key-base64-rijndael=c2VjcmV0"], ["--key-hmac", "c2VjcmV0"],
                          WORK + ["c2VjcmV0"], ["-k", "c2VjcmV0" * 9], WORK + ["--key=c2VjcmV0"],
                          ["-kc2VjcmV0"], ["-k=c2VjcmV0"], ["--qr=c2VjcmV0"], ["-Vc2VjcmV0"],
                          ["--man=c2VjcmV0'"],
                          *([f"{names.split()[-1]}=c2VjcmV0/+\"'"] for names, _, parse, _ in
                            keygen.OPTIONS
                            if parse is not keygen.parse_path)):
            code, out, err = call(*arguments)
            self.assertEqual((2, ""), (code, out))
            self.assertRegex(err, r"\Akeygen\.py: [^\n]{10,}\n\Z")
            self.assertNotIn("c2vjcmv0", err.lower())

    def test_help(self) -> None:
        """--help tells about REQUIRE_SOURCE_ADDRESS, on standard output, and gives examples."""
        answer = program("--help")
        self.assertEqual((0, b""), (answer.returncode, answer.stderr))
        self.assertIn(b"keygen.py work --server gate.example --access tcp/22\n", answer.stdout)
        self.assertIn(b"-R", answer.stdout)
        self.assertIn(b"REQUIRE_SOURCE_ADDRESS Y", answer.stdout)


class AppendTest(FileTestCase):
    """--rc-file and --access-file."""

    def test_new_files_are_for_their_owner_alone(self) -> None:
        """Mode 0600 under any umask; what went to a file is not printed."""
        for mask in (0o000, 0o022, 0o077, 0o277):
            with self.subTest(umask=oct(mask)):
                rc, access = self.path(f"rc{mask}"), self.path(f"access{mask}")
                before = os.umask(mask)
                try:
                    code, out, err = call(*WORK, "--rc-file", rc, "--access-file", access)
                finally:
                    os.umask(before)
                self.assertEqual((0, "", ""), (code, out, err))
                self.assertEqual((0o600, 0o600), (self.mode(rc), self.mode(access)))
                self.assertTrue(self.read(rc).startswith("[work]\nACCESS"))
                self.assertTrue(self.read(access).startswith("# work\nSOURCE"))
        self.assertEqual(8, len(os.listdir(self.directory)))

    def test_the_other_stanza_is_printed(self) -> None:
        """With the same keys."""
        rc = self.path("rc")
        code, out, _ = call(*WORK, "--rc-file", rc)
        self.assertEqual(0, code)
        self.assertNotIn("[work]", out)
        client, server = dict(directives(self.read(rc))), dict(directives(out))
        self.assertEqual(client["KEY_BASE64"], server["KEY_BASE64"])
        code, out, _ = call(*WORK, "--access-file", self.path("access"))
        self.assertIn("[work]", out)
        self.assertNotIn("OPEN_PORTS", out)

    def test_what_was_there_stays(self) -> None:
        """Every byte of it, first; with a blank line between, and mode as it was."""
        for old, gap in ((b"[old]\nX 1\n", b"\n"), (b"[old]\nX 1", b"\n\n"), (b"", b""),
                         (b"# \xff\xe4\r\n[o]\r\n", b"\n"), (b"\n\n", b"\n")):
            with self.subTest(old):
                rc = self.path("rc", old, 0o400)
                self.assertEqual((0, ""), call(*WORK, "--rc-file", rc)[::2])
                with open(rc, "rb") as stream:
                    self.assertTrue(stream.read().startswith(old + gap + b"[work]\n"))
                self.assertEqual(0o400, self.mode(rc))
                os.unlink(rc)

    def test_a_file_open_to_others_is_warned_of(self) -> None:
        """And keeps its mode, which is the administrator's."""
        rc = self.path("rc", "", 0o644)
        code, _, err = call(*WORK, "--rc-file", rc)
        self.assertEqual((0, 0o644), (code, self.mode(rc)))
        self.assertEqual(f"keygen.py: warning: {rc} is open to others (mode 0644): chmod 600\n",
                         err)

    @needs_root
    def test_the_owner_stays(self) -> None:
        """When root adds to a user's file, or rotates the keys in it."""
        rc = self.path("rc", "x\n")
        os.chown(rc, 12345, 23456)
        for arguments in (WORK, ["--rotate", "work"]):
            code, _, err = call(*arguments, "--rc-file", rc)
            self.assertEqual(0, code, err)
            self.assertNotIn("warning", err)
            self.assertEqual((12345, 23456), (os.stat(rc).st_uid, os.stat(rc).st_gid))

    def test_home(self) -> None:
        """`~` is the home directory, where no shell has put it in: `--rc-file=~/.fwknoprc`."""
        with mock.patch.dict(os.environ, {"HOME": self.directory}):
            self.assertEqual(0, call(*WORK, "--rc-file=~/.fwknoprc")[0])
        self.assertIn("[work]", self.read(self.path(".fwknoprc")))

    def test_what_was_written_is_said(self) -> None:
        """On standard error, a line for each file; not for one that refused."""
        rc, access = self.path("rc"), self.path("access")
        code, out, err = call_all(*WORK, "--rc-file", rc, "--access-file", access)
        self.assertEqual((0, ""), (code, out))
        self.assertEqual("".join(f"[+] Wrote the stanza of work to: {os.path.realpath(path)}\n"
                                 for path in (rc, access)) + RELOAD, err)
        self.assertNotIn("Wrote", call_all(*WORK, "--rc-file", rc)[2])
        self.assertNotIn(RELOAD, call_all("n", *WORK[1:], "--rc-file", rc)[2])

    def test_links_are_followed_and_stay(self) -> None:
        """Also to a file that does not exist yet."""
        os.mkdir(self.path("dots"))
        for name, text in (("old", "x\n"), ("new", None)):
            target = self.path(os.path.join("dots", name), text)
            link = self.path("link-" + name)
            os.symlink(os.path.join("dots", name), link)
            self.assertEqual((0, ""), call(*WORK, "--rc-file", link)[::2])
            self.assertTrue(os.path.islink(link))
            self.assertIn("[work]", self.read(target))
            self.assertEqual(0o600, self.mode(target))

    @needs_root
    def test_nobody_leads_root_to_a_file_of_roots(self) -> None:
        """By a link to the file or to a directory on the way, or by a second name."""
        os.mkdir(self.path("joe"))
        os.mkdir(self.path("joe/sub"))
        os.mkdir(self.path("etc"))
        secret = self.path("etc/rc", "[root]\nX 1\n")
        os.symlink(secret, self.path("joe/file"))
        os.symlink("../etc", self.path("joe/dir"))
        os.symlink("file", self.path("joe/twice"))
        os.link(secret, self.path("joe/hard"))
        for name in ("joe", "joe/sub", "joe/file", "joe/dir", "joe/twice"):
            os.lchown(self.path(name), 1234, 1234)
        for name, why in (("file", "joe/file is a link of another user's"),
                          ("dir/rc", "joe/dir is a link of another user's"),
                          ("twice", "joe/twice is a link of another user's"),
                          ("sub/../file", "joe/sub/../file is a link of another user's"),
                          ("hard", "joe/hard: has another name elsewhere")):
            with self.subTest(name):
                code, out, err = call(*WORK, "--rc-file", self.path("joe/" + name))
                self.assertEqual((1, ""), (code, out))
                self.assertIn(why, err)
        real = os.open

        def swap(path: Any, *arguments: Any, **more: Any) -> int:
            """Put a link in the place of the directory that is about to be opened."""
            if path == self.path("joe/sub"):
                os.rmdir(path)
                os.symlink("../etc", path)
            return real(path, *arguments, **more)

        with mock.patch.object(os, "open", swap):
            self.assertIn("another directory in its place",
                          call(*WORK, "--rc-file", self.path("joe/sub/rc"))[2])
        self.assertEqual(("[root]\nX 1\n", ["rc"]), (self.read(secret), os.listdir(
            self.path("etc"))))
        self.assertEqual(0, call(*WORK, "--rc-file", self.path("joe/new"))[0])

    def test_a_name_twice_is_refused(self) -> None:
        """In any case, by `[name]` or `# name`; nothing is written to either file."""
        rc, access = self.path("rc"), self.path("access")
        for rc_text, access_text, line in (
                ("[a]\n[WORK]\n", "", 2), ("  [Work]\r\n", "", 1), ("", "\n\n#  Work \n", 3)):
            with self.subTest(rc_text + access_text):
                self.path("rc", rc_text)
                self.path("access", access_text)
                code, out, err = call(*WORK, "--rc-file", rc, "--access-file", access,
                                      "--expires", "8h")  # and no word of a pass
                self.assertEqual((3, ""), (code, out))
                self.assertRegex(err, rf"\Akeygen.py: \S+: has a stanza .* in line {line}\n\Z")
                self.assertEqual((rc_text, access_text), (self.read(rc), self.read(access)))
        self.path("rc", "[workshop]\n# work\n[my work]\n")
        self.path("access", "# workshop\n[work]\n#work-2\n")
        self.assertEqual(0, call(*WORK, "--rc-file", rc, "--access-file", access)[0])

    def test_files_that_cannot_be_used(self) -> None:
        """A directory, a missing one, a device, a pipe, a loop: one line, exit code 1."""
        os.mkfifo(self.path("pipe"))
        os.symlink("loop", self.path("loop"))
        for path in (self.directory, self.path("no/rc"), "/dev/null", self.path("pipe"),
                     self.path("loop")):
            with self.subTest(path):
                code, out, err = call(*WORK, "--access-file", path)
                self.assertEqual((1, ""), (code, out))
                self.assertRegex(err, r"\Akeygen\.py: /\S+: [^\n]+\n\Z")
        self.assertEqual(["loop", "pipe"], sorted(os.listdir(self.directory)))


class ErrorTest(unittest.TestCase):
    """Errors are one line, in keygen.py as in the two other scripts."""

    def test_explain(self) -> None:
        """The name is the caller's, or that of the OSError's file, or the line of the script."""
        for script in (keygen, client, server):
            error, text = OSError(13, "Permission denied", "/f"), "Permission denied"
            self.assertEqual(f"/f: {text}", script.explain(error))
            self.assertEqual(f"gate: {text}", script.explain(error, "gate"))
            self.assertRegex(script.explain(OSError(13, text)), rf"\Aline \d+: {text}\Z")
            self.assertEqual("timed out", script.explain(ValueError("timed out")))
            self.assertEqual("gate: timed out", script.explain(OSError("timed out"), "gate"))
            self.assertEqual("do it", script.SpaError("this", "do it").hint)
            self.assertEqual("this", script.explain(script.SpaError("this", "do it")))

    def test_an_error_that_no_code_expects(self) -> None:
        """A directory that was removed below us: one line, which names the script's line."""
        with mock.patch.object(os, "getcwd", side_effect=FileNotFoundError(2, "No such file")):
            code, out, err = call(*WORK, "--access-file", "access.conf")
        self.assertEqual((1, ""), (code, out))
        self.assertRegex(err, r"\Akeygen\.py: line \d+: No such file\n\Z")


class CrashTest(FileTestCase):
    """After any failure a file has its old or its new text, and no copy remains."""

    def test_a_failure_at_any_call_leaves_everything_as_it_was(self) -> None:
        """Full disk, no permission, input/output error: at each call that touches the file."""
        for name in ("write", "fsync", "fchmod", "replace"):
            for old in ("[old]\nX 1\n", None):
                with self.subTest(call=name, old=old):
                    self.check_failure(name, old)

    def check_failure(self, name: str, old: Any) -> None:
        """Let one call fail while a stanza is added to a file that is `old`, or new."""
        rc, access = self.path("rc", old), self.path("access", "# x\n")
        error = OSError(28, "No space left on device")
        if name == "write":  # open() with "wb" is only used for the copy
            real = open

            def broken(*arguments: Any, **more: Any) -> Any:
                if arguments[1:2] == ("wb",):
                    os.close(arguments[0])
                    raise error
                return real(*arguments, **more)
            patch: Any = mock.patch.object(keygen, "open", broken, create=True)
        else:
            patch = mock.patch.object(os, name, side_effect=error)
        with patch:
            code, _, err = call(*WORK, "--rc-file", rc, "--access-file", access)
        self.assertEqual(1, code)
        self.assertEqual(f"keygen.py: {rc}: No space left on device\n", err)
        self.assertEqual("# x\n", self.read(access))
        self.assertEqual(old, self.read(rc) if os.path.exists(rc) else None)
        self.assertEqual(["access"] + ["rc"] * (old is not None),
                         sorted(os.listdir(self.directory)))
        for name in os.listdir(self.directory):
            os.unlink(self.path(name))

    def test_what_cannot_be_printed_is_not_appended(self) -> None:
        """A key in a file without its other half would be of no use."""
        rc = self.path("rc", "# old\n")
        with open("/dev/full", "wb") as full:
            answer = program(*WORK, "--rc-file", rc, stdout=full)
        self.assertEqual((1, b"keygen.py: standard output: No space left on device\n"),
                         (answer.returncode, answer.stderr))
        self.assertEqual("# old\n", self.read(rc))

    def test_killed_between_copy_and_rename(self) -> None:
        """kill -9 leaves the old file, and the next run works."""
        rc = self.path("rc", "[old]\n")
        pid = os.fork()
        if pid == 0:
            try:
                with mock.patch.object(os, "replace",
                                       lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)):
                    call(*WORK, "--rc-file", rc)
            finally:
                os._exit(1)
        self.assertEqual(signal.SIGKILL, os.waitpid(pid, 0)[1])
        self.assertEqual("[old]\n", self.read(rc))
        self.assertEqual([0o600] * 2, [self.mode(self.path(name))
                                       for name in os.listdir(self.directory)])
        self.assertEqual(0, call(*WORK, "--rc-file", rc)[0])
        self.assertEqual(1, self.read(rc).count("[work]"))

    def test_who_holds_the_lock_is_not_waited_for_for_ever(self) -> None:
        """Anybody who can read a directory can lock it: the file stays, and one line names it."""
        rc = self.path("rc", "[old]\n")
        fd = os.open(self.directory, os.O_RDONLY)
        self.addCleanup(os.close, fd)
        fcntl.flock(fd, fcntl.LOCK_EX)
        with mock.patch.object(keygen, "LOCK_TRIES", 10):
            self.assertEqual((1, "",
                              f"keygen.py: {self.directory}: another program keeps it locked\n"),
                             call(*WORK, "--rc-file", rc))
        self.assertEqual(("[old]\n", ["rc"]), (self.read(rc), os.listdir(self.directory)))
        threading.Timer(0.2, fcntl.flock, (fd, fcntl.LOCK_UN)).start()
        self.assertEqual(0, call(*WORK, "--rc-file", rc)[0])

    def test_a_file_system_without_locks(self) -> None:
        """NFS has none for who only reads: the stanza is written all the same."""
        with mock.patch.object(fcntl, "flock", side_effect=OSError(9, "Bad file descriptor")):
            self.assertEqual((0, ""), call(*WORK, "--rc-file", self.path("rc"))[::2])
        self.assertIn("[work]", self.read(self.path("rc")))

    def test_many_at_once_lose_no_stanza(self) -> None:
        """Eight runs add to one file that does not exist yet; each stanza is whole."""
        rc = self.path("rc")
        self.assertEqual([0] * 8, all_at_once([[f"n{number}", *WORK[1:], "--rc-file", rc]
                                               for number in range(8)]))
        text = self.read(rc)
        self.assertEqual({f"[n{n}]" for n in range(8)}, set(re.findall(r"^\[.*\]$", text, re.M)))
        self.assertEqual(8, len(re.findall(r"^\[n\d\]\n(?:[A-Z]\S+ +\S+\n){6}", text, re.M)))
        self.assertEqual(["rc"], os.listdir(self.directory))


class OutputTest(FileTestCase):
    """Standard output is a file, a pipe, or closed."""

    def test_a_file_open_to_others_is_warned_of(self) -> None:
        """The shell's umask made it so; the keys are written all the same."""
        for mode, warned in ((0o644, True), (0o640, True), (0o600, False)):
            path = self.path("out", "", mode)
            for arguments in ([], WORK):
                with open(path, "wb") as stream:
                    answer = program(*arguments, stdout=stream)
                self.assertEqual(0, answer.returncode)
                self.assertEqual(warned, b"is open to others" in answer.stderr)
                self.assertIn("KEY_BASE64", self.read(path))
        self.assertEqual(b"", program().stderr)

    def test_version_is_no_secret(self) -> None:
        """Warn of nothing."""
        with open(self.path("out", "", 0o644), "wb") as stream:
            self.assertEqual(b"", program("-V", stdout=stream).stderr)

    def test_standard_error_is_closed(self) -> None:
        """Keep its lines out of the keys, and the exit codes as they are."""
        answer = program(*WORK, "--rc-file", self.path("rc"), preexec_fn=lambda: os.close(2))
        self.assertEqual(0, answer.returncode)
        self.assertNotIn(b"[+]", answer.stdout)
        answer = program("--nonsense", preexec_fn=lambda: os.close(2))
        self.assertEqual((2, b""), (answer.returncode, answer.stdout))


class FwknopTest(FileTestCase):
    """The real client and the real server read what is printed here."""

    @needs_programs("fwknop")
    def test_keys_have_the_shape_of_fwknops(self) -> None:
        """Line by line, letter class by letter class."""
        answer = run(["fwknop", "--key-gen", "--rc-file", self.path("rc")])
        shape = [re.sub(r"[A-Za-z0-9+/]", "x", line.partition(": ")[2])
                 for line in answer.stdout.splitlines() if "KEY_BASE64" in line]
        ours = call()[1].splitlines()
        self.assertEqual(shape, [re.sub(r"[A-Za-z0-9+/]", "x", line.partition(": ")[2])
                                 for line in ours])
        self.assertEqual([line.partition(": ")[0] for line in ours],
                         ["KEY_BASE64", "HMAC_KEY_BASE64"])

    @needs_programs("fwknop")
    def test_the_client_reads_the_rc_file(self) -> None:
        """With our own address to name, or the one the packet comes from; all digests."""
        rc = self.path("rc")
        for number, (digest, more, address) in enumerate((
                ("md5", [], "192.0.2.7"), ("sha256", ["--any-source"], "0.0.0.0"),
                ("sha512", [], "192.0.2.7"), ("sha3_256", [], "192.0.2.7"),
                ("sha3_512", ["--port", "4000"], "192.0.2.7"))):
            with self.subTest(digest):
                name = f"n{number}"
                self.assertEqual(0, call(name, *WORK[1:], "--rc-file", rc, "--username", "joe",
                                         "--hmac-digest-type", digest, *more)[0])
                said = [] if "--any-source" in more else ["-a", "192.0.2.7"]
                answer = run(["fwknop", "-T", "--rc-file", rc, "--no-save-args", "-n", name, *said],
                             env={**os.environ, "HOME": self.directory})
                self.assertEqual(("", 0), (answer.stderr, answer.returncode))
                self.assertRegex(answer.stdout, r"Username: joe\n")
                self.assertRegex(answer.stdout, rf"Message String: {address},tcp/22\n")
                self.assertRegex(answer.stdout, rf"HMAC Type: \d \({digest.upper()}\)")

    @needs_programs("fwknopd")
    def test_the_server_reads_the_access_file(self) -> None:
        """Two stanzas in one file; every directive arrives."""
        access = self.path("access")
        self.assertEqual(0, call(*WORK, "--access-file", access)[0])
        self.assertEqual(0, call("two", *WORK[1:], "--access", "tcp/22,udp/53", "--timeout", "60",
                                 "--access-file", access, "--source", "192.0.2.0/24,198.51.100.1",
                                 "--username", "joe", "--hmac-digest-type", "sha512",
                                 "--expires", "2037-12-31")[0])
        end = time.mktime((2037, 12, 31, 0, 0, 0, 0, 0, -1))
        first, second = self.fwknopd_reads(access).partition("SOURCE (2):")[::2]
        for text, lines in ((first, ("OPEN_PORTS: tcp/22", "KEY_LEN: 32", "HMAC_KEY_LEN: 64",
                                     "FW_ACCESS_TIMEOUT: 30", "REQUIRE_SOURCE_ADDRESS: Yes",
                                     "REQUIRE_USERNAME: <not set>")),
                            (second, ("192.0.2.0/24,198.51.100.1/32", "OPEN_PORTS: tcp/22,udp/53",
                                      "HMAC_KEY_LEN: 128", "FW_ACCESS_TIMEOUT: 60",
                                      "REQUIRE_USERNAME: joe",
                                      f"ACCESS_EXPIRE: {time.ctime(end)}"))):
            for line in lines:
                self.assertIn(line + "\n", text)


if __name__ == "__main__":
    unittest.main()
