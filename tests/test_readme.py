"""The README says what the code and the saved results say."""

from tools import readme


def test_tables_are_those_of_the_code_and_the_saved_results():
    text = readme.README.read_text("utf-8")
    assert readme.render(text) == text, "run `python -m tools.readme`"


def test_the_tree_names_folders_that_exist():
    tree = readme.README.read_text("utf-8").split("## The house")[1].split("```")[1]
    for line in tree.strip().splitlines():
        name = line.split()[0].rstrip(",")
        if not line.startswith(" "):
            parent, path = name, readme.ROOT / name
        else:
            path = readme.ROOT / parent / name
        assert path.exists(), f"{path} is in the README's tree and nowhere else"
