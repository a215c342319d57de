"""What can be refused of a release before Prefect is started, which takes seconds."""

from pathlib import Path

from lightship.checkpoint import Checkpoint
from lightship.errors import LightshipError
from lightship.eval.load.traces import read_trace
from lightship.eval.questions import read_questions
from lightship.eval.tasks import check_subjects, check_tasks
from lightship.quant.capacity import GPUS
from lightship.quant.plan import plan_quantization
from lightship.recipe import load_recipe
from lightship.release import digest_of_questions
from lightship.text import digest_of_text


def check_inputs(source: Path, recipe_path: Path) -> None:
    """Check headers, plan, recipe, degree of tensor parallelism, texts and questions.

    Raises:
        LightshipError: names what is missing, damaged or impossible.
    """
    recipe = load_recipe(recipe_path)
    checkpoint = Checkpoint.open(source)
    plan = plan_quantization(checkpoint)
    checkpoint.transformers_config()
    if recipe.serving.tp not in plan.tensor_parallel:
        raise LightshipError(
            f"the recipe {recipe_path} serves at TP {recipe.serving.tp}, which {source} cannot be divided by in whole "
            f"groups of 128; possible: {', '.join(map(str, plan.tensor_parallel))}; change `serving.tp`"
        )
    context = int(checkpoint.config.get("max_position_embeddings", 0))
    for where, tokens in (
        ("calibration.sequence_tokens", recipe.calibration.sequence_tokens),
        ("fidelity.sequence_tokens", recipe.fidelity.sequence_tokens),
        ("throughput.prompt_tokens + output_tokens", recipe.throughput.prompt_tokens + recipe.throughput.output_tokens),
    ):
        if tokens > context:
            raise LightshipError(
                f"the recipe {recipe_path}: {where} is {tokens}, the model's context {context}; lower it"
            )
    if recipe.throughput.trace:
        read_trace(Path(recipe.throughput.trace.path))
    digest_of_text([*recipe.calibration.sources, *recipe.fidelity.sources])
    digest_of_questions(recipe.accuracy)
    if recipe.accuracy.questions is not None:
        check_subjects(recipe.accuracy.task_name, read_questions(Path(recipe.accuracy.questions)))
    fit = recipe.gate.fit
    if fit is not None and not any(gpu.startswith(fit.gpu) for gpu in GPUS):
        raise LightshipError(
            f"the recipe {recipe_path}: gate.fit.gpu {fit.gpu!r} is none that is known: {', '.join(GPUS)}"
        )
    check_tasks(recipe.accuracy)
