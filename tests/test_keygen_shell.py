"""keygen.py --completion, in the shells themselves, and --man."""

import os
import pty
import re
import select
import subprocess
import unittest
from typing import Dict, List

from tests.support import needs_programs, run, wait_for
from tests.test_keygen import FileTestCase, call_all, program


class ShellTest(FileTestCase):
    """--completion and --man say what --help says."""

    def setUp(self) -> None:
        """Collect the long options that --help lists."""
        super().setUp()
        said = program("--help").stdout.decode()
        self.options = set(re.findall(r"^  (?:-., )?(--[a-z][a-z-]+)", said, re.M))
        self.assertGreater(len(self.options), 15)

    def complete(self, shell: str, *words: str) -> List[str]:
        """Return what a shell offers behind words, the last of which is not finished."""
        path = self.path("completion", program("--completion", shell).stdout)
        if shell == "fish":
            command = 'source $argv[1]; complete -C (string join " " -- $argv[2..-1])'
            answer = run(["fish", "--no-config", "-c", command, path, *words], cwd=self.directory,
                         env={**os.environ, "HOME": self.directory})
        else:
            command = ('complete() { options=("$@"); unset "options[-1]"; }; source "$1"; '
                       'compgen "${options[@]}" -- "${@: -1}"')
            answer = run(["bash", "--norc", "-c", command, "bash", path, *words],
                         cwd=self.directory)
        self.assertEqual((0, ""), (answer.returncode, answer.stderr))
        return sorted(line.partition("\t")[0] for line in answer.stdout.splitlines() if line)

    def check(self, shell: str) -> None:
        """Complete by the beginning; offer all options, and nothing else."""
        self.assertEqual(["--rc-file", "--retire", "--rotate", "--rsa-bits"],
                         self.complete(shell, "keygen.py", "--r"))
        self.assertEqual(["--port"], self.complete(shell, "keygen.py", "work", "--qr", "--po"))
        self.assertIn("completion", self.complete(shell, "keygen.py", "--rc-file", "comp"))
        listed = {word for word in self.complete(shell, "keygen.py", "--") if word[:2] == "--"}
        self.assertEqual(self.options, listed)

    @needs_programs("bash")
    def test_bash(self) -> None:
        """In bash itself."""
        self.check("bash")

    @needs_programs("zsh")
    def test_zsh(self) -> None:
        """In zsh, typed on a terminal: its emulation of bash's completion has no other way in."""
        path = self.path("completion", program("--completion", "zsh").stdout)
        ours, theirs = pty.openpty()
        self.addCleanup(os.close, ours)
        zsh = subprocess.Popen(["zsh", "-f", "-i"], stdin=theirs, stdout=theirs, stderr=theirs,
                               cwd=self.directory, start_new_session=True,
                               env={**os.environ, "ZDOTDIR": self.directory, "TERM": "dumb"})
        os.close(theirs)
        try:
            self.type(ours, f"autoload -U compinit && compinit -D -u; source {path}; "
                            "echo rea''dy\n", "ready")
            self.type(ours, "keygen.py work --r\t\t", r"--rc-file *--retire *--rotate *--rsa-bits")
            self.type(ours, "\x15keygen.py --reti\t", "--retire ")
            self.type(ours, "\x15keygen.py --rc-file comp\t", "completion")
        finally:
            zsh.kill()
            zsh.wait()

    def type(self, terminal: int, keys: str, expected: str) -> None:
        """Type, and wait until the terminal shows what is expected."""
        os.write(terminal, keys.encode())
        shown = ""

        def is_shown() -> bool:
            nonlocal shown
            if select.select([terminal], [], [], 0)[0]:
                shown += os.read(terminal, 65536).decode(errors="replace")
            return bool(re.search(expected, shown))

        wait_for(is_shown, lambda: f"{expected} in {shown!r}")

    @needs_programs("fish")
    def test_fish(self) -> None:
        """In fish itself."""
        self.check("fish")

    def test_other_shells(self) -> None:
        """A wrong command line, which names those that there are."""
        code, out, err = call_all("--completion", "csh")
        self.assertEqual((2, ""), (code, out))
        self.assertRegex(err, r"\Akeygen.py: .*--completion: expected one of bash zsh fish\n\Z")

    def test_man(self) -> None:
        """Every option, and no line that roff would take for a request of its own."""
        page = program("--man").stdout.decode("ascii")
        text = page.replace("\\-", "-")
        self.assertEqual(self.options, set(re.findall(r"^\.B (?:-. )?(--[a-z-]+)", text, re.M)))
        requests = {line.split(" ")[0] for line in page.splitlines() if line[:1] in (".", "'")}
        self.assertEqual({".TH", ".SH", ".TP", ".B", ".PP", ".ad", ".nf", ".fi"}, requests)
        self.assertNotIn("Contents", page)
        for word in ("Exit codes", "1. What"):
            self.assertNotIn(word, page)

    @needs_programs("mandoc")
    def test_mandoc_has_nothing_against_it(self) -> None:
        """No error, and the text comes out."""
        answer = subprocess.run(["mandoc", "-T", "lint", "-W", "error"], timeout=60,
                                input=program("--man").stdout, stdout=subprocess.PIPE)
        self.assertEqual((0, b""), (answer.returncode, answer.stdout))
        answer = subprocess.run(["mandoc", "-T", "ascii"], input=program("--man").stdout,
                                stdout=subprocess.PIPE, timeout=60)
        text: Dict[str, str] = dict(re.findall(r"^([A-Z ]+)\n +(\S.*)", re.sub(
            ".\b", "", answer.stdout.decode()), re.M))
        self.assertTrue(text["NAME"].startswith("keygen.py - Make the keys"), text)
        self.assertTrue(text["EXIT STATUS"].startswith("0 done"), text)


if __name__ == "__main__":
    unittest.main()
