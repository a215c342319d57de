"""What can be refused of a release before Prefect is started, which takes seconds."""

from pathlib import Path

from lightship.checkpoint import Checkpoint
from lightship.errors import LightshipError
from lightship.quant.plan import plan_quantization
from lightship.recipe import load_recipe
from lightship.release import question_files
from lightship.text import digest_of_text


def check_inputs(source: Path, recipe_path: Path) -> None:
    """Check headers, plan, recipe, degree of tensor parallelism, texts and questions.

    Raises:
        LightshipError: names what is missing, damaged or impossible.
    """
    recipe = load_recipe(recipe_path)
    plan = plan_quantization(Checkpoint.open(source))
    if recipe.serving.tp not in plan.tensor_parallel:
        raise LightshipError(
            f"the recipe {recipe_path} serves at TP {recipe.serving.tp}, which {source} cannot be divided by in whole "
            f"groups of 128; possible: {', '.join(map(str, plan.tensor_parallel))}; change `serving.tp`"
        )
    digest_of_text([*recipe.calibration.sources, *recipe.fidelity.sources])
    question_files(Path(recipe.accuracy.questions))
