import pytest

import recipes
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


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (
            "GRPO(max_step=3)",
            ["GRPO.max_step = 3: GRPO has no field 'max_step'; did you mean 'max_steps'? Fields: beta,"],
        ),
        (
            "Model(path='x', lora={'ranks': 1})",
            ["Model.lora.ranks = 1", "did you mean 'rank'? Fields: alpha, dropout,"],
        ),
        ("GRPO(max_steps='many', beta=-1)", ["GRPO.max_steps = 'many': expected a valid integer", "GRPO.beta = -1"]),
        ("Domain(tasks=3)", ["Domain.tasks = 3: expected an instance of TaskSource", "Domain.reward is missing"]),
        ("GRPO(loss_type='cispo')", [": grpo.epsilon_high = None with loss_type = 'cispo'", "set epsilon_high"]),
        ("quickstart().replace(seed='x')", ["Recipe.seed = 'x': expected a valid integer"]),
    ],
)
@pytest.mark.parametrize("where", ["at import", "in recipe()"])
def test_a_wrong_value_ends_with_its_field_its_line_and_status_2(tmp_path, capsys, value, parts, where):
    file = tmp_path / "wrong_values.py"
    line = f"WRONG = {value}" if where == "at import" else f"def recipe(): return {value}"
    file.write_text(f"from posttrain.config import *\nfrom recipes.quickstart import recipe as quickstart\n{line}\n")
    assert main(["show", str(file)]) == 2
    message = capsys.readouterr().err
    for part in [f"recipe '{file}', line 3 of {file}: ", *parts]:
        assert part in message


def test_listing_names_the_recipe_with_a_wrong_value(tmp_path, monkeypatch, capsys):
    (tmp_path / "wrong_values.py").write_text(
        "from posttrain.config import SFT\nWRONG = SFT(steps=3)\ndef recipe(): ...\n"
    )
    monkeypatch.setattr(recipes, "__path__", [str(tmp_path)])
    assert main(["list"]) == 2
    assert "recipe 'recipes.wrong_values', line 2 of " in capsys.readouterr().err


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
