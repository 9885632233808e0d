import pytest

from posttrain.cli import main
from posttrain.errors import RecipeError
from posttrain.loader import list_recipes, load_recipe

RECIPE = '''"""A recipe in a file."""
from recipes.quickstart import recipe as quickstart


def recipe():
    return quickstart().replace(name="from-file")


def other():
    return quickstart().replace(name="other-one")


def wrong():
    return 3
'''


@pytest.fixture
def recipe_file(tmp_path):
    file = tmp_path / "my_recipe.py"
    file.write_text(RECIPE)
    return file


def test_a_file_a_function_and_a_short_name_are_found(recipe_file):
    assert load_recipe(str(recipe_file)).name == "from-file"
    assert load_recipe(f"{recipe_file}:other").name == "other-one"
    assert load_recipe("quickstart").name == load_recipe("recipes.quickstart").name == "quickstart"


def test_an_unknown_recipe_lists_what_exists():
    with pytest.raises(RecipeError) as problem:
        load_recipe("quikstart")
    assert "Did you mean 'quickstart'" in str(problem.value)
    for name in list_recipes():
        assert name in str(problem.value)


@pytest.mark.parametrize(
    ("target", "part"),
    [("{file}:nothing", "no function nothing()"), ("{file}:wrong", "returned int"), ("./absent.py", "does not exist")],
)
def test_a_module_without_a_recipe_says_so(recipe_file, target, part):
    with pytest.raises(RecipeError, match=part.replace("(", r"\(").replace(")", r"\)")):
        load_recipe(target.format(file=recipe_file))


def test_a_missing_import_inside_a_recipe_is_not_hidden(tmp_path):
    (tmp_path / "broken_recipe.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        load_recipe(str(tmp_path / "broken_recipe.py"))


def test_the_command_line_lists_and_shows(capsys):
    assert main(["list"]) == 0
    assert "quickstart" in capsys.readouterr().out
    assert main(["show", "quickstart", "--set", "seed=5"]) == 0
    assert '"seed": 5' in capsys.readouterr().out


def test_a_wrong_name_ends_with_a_message_and_status_2(capsys):
    assert main(["run", "quikstart"]) == 2
    assert "unknown recipe" in capsys.readouterr().err
