"""The README says what the code does: its tables come from the code's tables.

`python3 -m tests.test_readme --write` puts them in.
"""

import os
import re
import sys
import tempfile
import textwrap
import unittest

import spa_client as client
import spa_server as server
from tests.support import TOP
from tests.test_differences import KINDS

README = os.path.join(TOP, "README.md")
WIDTH = 110
MAX_GUIDE = 250  # lines before the contents


def server_rows(settings):
    """The supported rows of one of the server's tables: name, default, help."""
    for row in settings.rows():
        if not isinstance(row, server.Ignored):
            yield " / ".join(row.names), row.default, row.help


def client_rows():
    """The directives of the client's table."""
    for row in client.DIRECTIVES.values():
        if row.name.isupper():
            yield row.name, row.default or "", row.help


def table(rows):
    """Rows as a table of Markdown."""
    lines = ["| directive | default | |", "|---|---|---|"]
    for name, default, help in rows:
        shown = "`%s`" % default if default else ""
        lines.append("| `%s` | %s | %s |" % (name, shown, help.replace("|", "\\|")))
    return "\n" + "\n".join(lines) + "\n"


def names(settings, kind):
    """The names in the rows of one kind, each with its reason."""
    lines = ["%s (%s)" % (", ".join("`%s`" % name for name in row.names), row.help)
             for row in settings.rows() if isinstance(row, kind)]
    return "\n" + textwrap.fill(";\n".join(lines) + ".", WIDTH, break_on_hyphens=False) + "\n"


def headings(text):
    """The level and text of every heading outside of code."""
    text = re.sub("(?ms)^```.*?^```$", "", text)
    return [(len(found[1]), found[2]) for found in re.finditer("(?m)^(#+) (.*)", text)]


def anchor(heading):
    """The name by which a page that shows Markdown links to a heading."""
    return re.sub("[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")


def contents(text):
    """The reference's sections, each with a link."""
    return "\n" + "\n".join("%s* [%s](#%s)" % ("  " * (level - 3), heading, anchor(heading))
                            for level, heading in headings(text.partition("\n## Reference\n")[2])
                            ) + "\n"


def generated(text):
    """`text` with every marked part replaced by what the code says."""
    parts = {"table: client": table(client_rows()), "contents: Reference": contents(text)}
    for name in ("ServerSettings", "Stanza", "KnockdOptions", "KnockdDoor"):
        settings = getattr(server, name)
        parts["table: " + name] = table(server_rows(settings))
    parts["table: METRICS"] = "\n| metric | |\n|---|---|\n%s\n" % "\n".join(
        "| `%s` | %s |" % (name, help) for name, help, _ in server.METRICS)
    parts["table: differences"] = "\n| an error here | fwknop's reading |\n|---|---|\n%s\n" % (
        "\n".join("| %s | %s |" % kind for kind in KINDS.values()))
    parts["ignored: ServerSettings"] = names(server.ServerSettings, server.Ignored)
    for mark, part in parts.items():
        kind = mark.partition(":")[0]
        pattern = "(<!-- %s -->).*?(<!-- end %s -->)" % (re.escape(mark), kind)
        text, count = re.subn(pattern, lambda found, part=part: found[1] + part + found[2], text,
                              flags=re.S)
        if count != 1:
            raise AssertionError("README.md has %d parts marked '%s'" % (count, mark))
    return text


def read():
    """The README as it is."""
    with open(README, encoding="ascii") as file:
        return file.read()


class ReadmeTest(unittest.TestCase):
    """The README against the code and the tree."""

    def test_tables_are_those_of_the_code(self):
        """Every directive, default and help text."""
        text = read()
        self.assertEqual(generated(text), text, "run: python3 -m tests.test_readme --write")

    def test_a_short_guide_comes_before_the_contents(self):
        """Every link leads to a heading, and no two headings have the same link."""
        text = read()
        self.assertLessEqual(len(text.partition("\n## Contents\n")[0].splitlines()), MAX_GUIDE)
        anchors = [anchor(heading) for _, heading in headings(text)]
        self.assertEqual(sorted(set(anchors)), sorted(anchors))
        self.assertLessEqual(set(re.findall(r"\]\(#([^)]*)\)", text)), set(anchors))

    def test_width(self):
        """A terminal shows every line but those of tables and of code that must not be broken."""
        self.assertEqual([], [line for line in read().splitlines()
                              if len(line) > WIDTH and not line.startswith(("|", "    "))])

    def test_files_that_it_names_exist(self):
        """Tests, scripts and commands."""
        found = set(re.findall(r"`(tests/[\w/]+\.\w+|\.ci/\w+|\w+\.py)`", read()))
        self.assertIn("tests/test_live.py", found)
        missing = [name for name in found if not os.path.exists(os.path.join(TOP, name))]
        self.assertEqual([], missing)

    def test_tests_that_it_names_exist(self):
        """In some file of tests."""
        source = ""
        for name in os.listdir(os.path.join(TOP, "tests")):
            if name.endswith(".py"):
                with open(os.path.join(TOP, "tests", name), encoding="utf-8") as file:
                    source += file.read()
        names = set(re.findall(r"`(test_\w+)`", read()))
        self.assertGreater(len(names), 10)
        self.assertEqual([], [name for name in names if "def %s(" % name not in source])

    def test_options_that_it_names_exist(self):
        """Long options in the text are options of a script."""
        known = {"--datestop", "--notrack",  # iptables
                 "--homedir", "--import", "--lsign-key", "--batch", "--passphrase",  # gpg
                 "--quick-gen-key", "--quick-add-key",
                 "--on-calendar", "--user"}  # systemd-run
        for option in (*server.OPTIONS, *client.OPTIONS):
            known |= {"--" + option.long} if option.long else set()
        with open(os.path.join(TOP, "keygen.py"), encoding="ascii") as file:
            known |= set(re.findall(r'"(--[a-z][a-z-]+)"', file.read()))
        wanted = set(re.findall(r"--[a-z][a-z-]+", read()))
        self.assertGreater(len(wanted), 8)
        self.assertEqual(set(), wanted - known)

    def test_init_prints_what_it_shows(self):
        """The stanza of the transcript has the lines of the server's, with other keys."""
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "access.conf")
            with open(path, "w", encoding="ascii") as file:
                file.write(server.SERVER_STANZA.format(name="gate", access="tcp/22", key="a" * 43,
                                                       hmac_key="b" * 43))
            settings = server.ServerSettings()
            settings.set_defaults()
            text = server.client_stanza(settings, server.read_stanzas(path)[0][0])
        text += "\n" + server.NEXT_STEPS.format(far=server.FAR_STEPS)
        for name, value in (("SPA_SERVER", "192.0.2.10"), ("KEY_BASE64", "(a key)"),
                            ("HMAC_KEY_BASE64", "(another)")):
            text = re.sub("(?m)^(%s +).*" % name, lambda match: match.group(1) + value,  # noqa: B023
                          text)
        shown = re.sub("(?m)^    ", "", read().partition("--init tcp/22\n")[2])
        self.assertTrue(shown.startswith(text), shown[:900])

    def test_log_lines_that_it_explains_exist(self):
        """Every line of the table stands in the server, as far as it has no variable part."""
        with open(os.path.join(TOP, "spa_server.py"), encoding="ascii") as file:
            source = re.sub(r'"\s*\n\s*f?"', "", file.read())
        section = read().partition("## Log lines")[2].partition("##")[0]
        lines = re.findall(r"^\| `(.*?)` \|", section, flags=re.M)
        self.assertGreater(len(lines), 10)
        for line in lines:
            for part in re.split(r"\.\.\.|\d+|joe", line):
                part = part.strip(" :.()")
                with self.subTest(part=part):
                    self.assertIn(re.sub("FKO_ERROR_INVALID_DATA_HMAC", "HMAC", part), source)


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        new = generated(read())
        with open(README, "w", encoding="ascii") as out:
            out.write(new)
    else:
        unittest.main()
