"""The shared blocks: equal to the letter, in marked pairs, and free of their host's names."""

import os
import unittest

from tests import shared
from tests.support import TOP, DirectoryCase, write

PAIR = {"sum": shared.Block(("a.py", "b.py"), frozenset(["os"]))}
BLOCK = ("# --- shared: sum -- the same text in a.py and b.py --\n"
         "LIMIT = 3\n"
         "def add(a: 'int', b: int) -> int:\n"
         "    return min(LIMIT, sum([a, b]) + len(os.sep))\n"
         "# --- end shared: sum --\n")


class RealBlocksTest(unittest.TestCase):
    """The blocks of the scripts themselves."""

    def test_nothing_is_wrong_with_the_shared_blocks(self) -> None:
        """Copies are equal, markers in pairs, names declared; see tests/shared.py."""
        for name, block in shared.BLOCKS.items():
            with self.subTest(block=name):
                self.assertEqual([], shared.check_block(TOP, name, block))
        with self.subTest("every block is registered"):
            known = [problem for problem in shared.find_problems() if "registry for" in problem]
            self.assertEqual([], known)


class CheckerTest(DirectoryCase):
    """The checker finds what it is for, and the copier mends it."""

    def setUp(self) -> None:
        """Make a directory with two scripts that share a block."""
        super().setUp()
        write(self.place("a.py"), "import os\n" + BLOCK + "print(1)\n")
        write(self.place("b.py"), "import os\nimport sys\n\n" + BLOCK)

    def problems(self) -> str:
        """Return what the checker says, as one text."""
        return "\n".join(shared.find_problems(self.directory, PAIR))

    def test_a_good_pair(self) -> None:
        """Nothing is said, nothing written."""
        self.assertEqual("", self.problems())
        self.assertEqual([], shared.write_copies(self.directory, PAIR))

    def test_a_copy_that_differs_is_found_and_mended(self) -> None:
        """One letter is enough; what is around the copy stays."""
        write(self.place("b.py"), "import os\nimport sys\n\n"
              + BLOCK.replace("= 3", "= 4") + "# end\n")
        self.assertIn("b.py: block sum differs from a.py's", self.problems())
        self.assertEqual(["b.py"], shared.write_copies(self.directory, PAIR))
        self.assertEqual("", self.problems())
        with open(os.path.join(self.directory, "b.py")) as stream:
            self.assertEqual("import os\nimport sys\n\n" + BLOCK + "# end\n", stream.read())

    def test_a_missing_block_or_script(self) -> None:
        """Both are told apart, and --write does not invent a place."""
        write(self.place("b.py"), "import os\n")
        self.assertIn("b.py: has no block sum", self.problems())
        os.unlink(os.path.join(self.directory, "b.py"))
        self.assertIn("b.py: does not exist, so it has no block sum", self.problems())
        self.assertEqual([], shared.write_copies(self.directory, PAIR))

    def test_markers_that_are_no_pairs(self) -> None:
        """Without an end, without a beginning, nested, twice, misspelt, for another file."""
        first, last = BLOCK.splitlines(True)[0], BLOCK.splitlines(True)[-1]
        for text, expected in (
                (first, "sum does not end"),
                (last, "line 1: sum ends, but did not begin"),
                (first + first.replace("sum", "x"), "line 2: x begins inside sum"),
                (BLOCK + BLOCK, "line 6: sum begins for the second time"),
                (BLOCK.replace("# --- end", "# -- end"), "line 5: looks like a marker"),
                (BLOCK.replace("b.py", "c.py"), "the marker of sum names a.py, c.py"),
                (BLOCK + first.replace("sum", "x") + last.replace("sum", "x"), "x is not in the"),
        ):
            with self.subTest(expected):
                write(self.place("b.py"), "" + text)
                self.assertIn(expected, self.problems())

    def test_names_of_the_host_file(self) -> None:
        """A global read, called, inherited, defaulted or only annotated is found; own are not."""
        for line, names in (
                ("x = HOST\n", {"HOST"}),
                ("def f(a=HOST):\n    return other(a)\n", {"HOST", "other"}),
                ("class C(Base):\n    x = 1\n    def f(self):\n        return C, x\n",
                 {"Base", "x"}),
                ("def f(a: 'List[int]') -> 'Dict[str, int]':\n    return a\n", {"List", "Dict"}),
                ("import os\ndef f(a):\n    b = [c for c in a]\n    return os.sep, b, f\n", set()),
        ):
            with self.subTest(line):
                self.assertEqual(names, shared.foreign_names(line))
        write(self.place("b.py"), BLOCK.replace("LIMIT,", "HOST,"))
        self.assertIn("b.py: block sum uses HOST", self.problems())


if __name__ == "__main__":
    unittest.main()
