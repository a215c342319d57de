"""A release, from a checkpoint to a promoted model: one call a stage, in order.

    lightship release demo/checkpoint --recipe recipes/demo.toml

Runs with Prefect's ephemeral server, or against PREFECT_API_URL. Each task is a thin wrapper around a function that
works without Prefect; a stage whose record exists is read, not run.
"""

from functools import cache
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from lightship import summary
from lightship.errors import LightshipError
from lightship.files import read_json
from lightship.flows.servers import Servers
from lightship.records import (
    Accuracy,
    Agreement,
    Calibration,
    Comparison,
    Fidelity,
    Plan,
    Promoted,
    Quantized,
    Staged,
    Throughput,
    Verdict,
    Verification,
)
from lightship.release import Release, StageDone
from lightship.tracking import Tracker


@flow(name="release", flow_run_name="release-{source}", validate_parameters=False)
def release(source: str, recipe: str, home: str, promote: bool = True) -> str:
    """Release the checkpoint directory `source` by the recipe file `recipe`; everything is kept in `home`.

    Returns:
        The release id. The records, the checkpoint and report.html are in HOME/releases/<id>.

    Raises:
        LightshipError: bad input, a failed verification, a server that does not get ready. A verdict that is not
            `pass` is no error: the release stays `challenger`.
    """
    work = Release.open(Path(source), Path(recipe), Path(home))
    tracker = Tracker.connect(work.home)
    print(f"release {work.release_id} of {source} by {recipe}", flush=True)
    with work.locked(), tracker.run_of(work.release_id, f"{work.recipe.model}-{work.release_id}") as run:
        run.log_release(work)

        def announce(stage: StageDone) -> None:
            note = "done before" if stage.cached else f"{stage.seconds:.1f} s"
            print(f"  {stage.name:<17} {summary.sentence(stage.record)}  ({note})", flush=True)
            run.log_stage(stage, work.directory)

        work.on_stage = announce
        plan = plan_tensors(work)
        quantized = quantize_experts(work, plan)
        report_calibration(work)
        verify_checkpoint(work)
        version = tracker.register(
            run.run_id, work.recipe.model, work.release_id, work.checkpoint_dir, quantized.manifest_digest
        )
        with Servers(work) as servers:
            stage_checkpoint(work, servers)
            if work.recipe.accuracy.sequential:
                before, after = evaluate_in_stages(work, servers)
            else:
                before = evaluate_source(work, servers)
                after = evaluate_quantized(work, servers)
            benchmark_both(work, servers)
        measure_fidelity(work)
        measure_agreement(work, before, after)
        compare_answers(work, before, after)
        verdict = decide(work, tracker)
        promoted = promote_champion(work, tracker) if promote and verdict.decision == "pass" else None
        for path in (write_report(work), *write_receipt(work, verdict)):
            run.log_file(path)
        run.log_verdict(verdict)
        run.tag("lightship.promoted", promoted.version if promoted else "no")
        champion = tracker.champion(work.recipe.model)
        if promoted and champion != version:
            print(
                f"  version {champion} is champion now; `lightship promote {work.release_id}` takes it back", flush=True
            )
    if not work.ran:
        print("every stage was done before; no work was repeated", flush=True)
    return work.release_id


@task(cache_policy=NO_CACHE)
def plan_tensors(work: Release) -> Plan:
    import msgspec

    from lightship.census import census
    from lightship.quant.capacity import fits_of
    from lightship.quant.plan import plan_quantization

    def run() -> Plan:
        plan = plan_quantization(work.source)
        return msgspec.structs.replace(plan, fits=fits_of(work.source, plan, census(work.source)))

    return work.stage("plan", Plan, run)


@task(cache_policy=NO_CACHE)
def quantize_experts(work: Release, plan: Plan) -> Quantized:
    from lightship.flows.cluster import quantize
    from lightship.quant.quantize import take_finished

    def run() -> Quantized:
        # A checkpoint under its name is whole: the release was stopped before it noted that.
        if work.checkpoint_dir.is_dir():
            return take_finished(work.checkpoint_dir)
        return quantize(work.source, plan, work.recipe, work.checkpoint_dir)

    return work.stage("quantized", Quantized, run)


@task(cache_policy=NO_CACHE)
def report_calibration(work: Release) -> Calibration:
    from lightship.quant.quantize import CALIBRATION

    return work.stage("calibration", Calibration, lambda: read_json(work.checkpoint_dir / CALIBRATION, Calibration))


@task(cache_policy=NO_CACHE)
def verify_checkpoint(work: Release) -> Verification:
    from lightship.eval.evidence import leave_receipt
    from lightship.eval.gate import verification_rule
    from lightship.quant.verify import verify

    def run() -> Verification:
        verification = verify(work.checkpoint_dir, work.source.path)
        if not verification.passed:
            # Nothing is asked of a checkpoint that cannot be served, so its verdict comes here.
            verdict = Verdict(decision="fail", rules=[verification_rule(verification)])
            why_not, _ = leave_receipt(work.directory, verdict)
            raise LightshipError(
                f"the checkpoint is not servable: {summary.sentence(verification)}; see {why_not}; "
                f"remove {work.directory} to make it again"
            )
        return verification

    return work.stage("verification", Verification, run)


@task(cache_policy=NO_CACHE)
def stage_checkpoint(work: Release, servers: Servers) -> Staged:
    return work.stage("staged", Staged, servers.stage)


@task(cache_policy=NO_CACHE)
def evaluate_source(work: Release, servers: Servers) -> Accuracy:
    from lightship.eval.accuracy import evaluate

    def run() -> Accuracy:
        return evaluate(servers.source, work.recipe.accuracy, work.source_directory)

    return work.stage("source-accuracy", Accuracy, run, work.source_directory)


@task(cache_policy=NO_CACHE)
def evaluate_quantized(work: Release, servers: Servers) -> Accuracy:
    from lightship.eval.accuracy import evaluate

    return work.stage("accuracy", Accuracy, lambda: evaluate(servers.quantized, work.recipe.accuracy, work.directory))


@task(cache_policy=NO_CACHE)
def evaluate_in_stages(work: Release, servers: Servers) -> tuple[Accuracy, Accuracy]:
    """How many answers of the source there are is then this release's, so its record is not the source's."""
    from lightship.eval.settling import evaluate_until_settled, loss_policy, sentence

    @cache
    def both() -> tuple[Accuracy, Accuracy]:
        return evaluate_until_settled(
            (servers.source, work.source_directory),
            (servers.quantized, work.directory),
            work.recipe.accuracy,
            loss_policy(work.recipe.gate),
            lambda look: print(f"    {sentence(look)}", flush=True),
        )

    before = work.stage("source-accuracy", Accuracy, lambda: both()[0])
    return before, work.stage("accuracy", Accuracy, lambda: both()[1])


@task(cache_policy=NO_CACHE)
def measure_agreement(work: Release, before: Accuracy, after: Accuracy) -> Agreement:
    from lightship.eval import agreement

    return work.stage("agreement", Agreement, lambda: agreement.measure_agreement(before, after))


@task(cache_policy=NO_CACHE)
def benchmark_both(work: Release, servers: Servers) -> Throughput:
    from lightship.eval.throughput import benchmark
    from lightship.text import read_prompts

    def run() -> Throughput:
        prompts = read_prompts(work.recipe.fidelity.sources[0], work.source.path, work.recipe.throughput)
        return benchmark({"source": servers.source, "quantized": servers.quantized}, work.recipe.throughput, prompts)

    return work.stage("throughput", Throughput, run)


@task(cache_policy=NO_CACHE)
def measure_fidelity(work: Release) -> Fidelity:
    from lightship.eval.fidelity import measure_fidelity as measure

    def run() -> Fidelity:
        return measure(work.source.path, work.checkpoint_dir, work.recipe.fidelity, work.recipe.serving.activations)

    return work.stage("fidelity", Fidelity, run)


@task(cache_policy=NO_CACHE)
def compare_answers(work: Release, before: Accuracy, after: Accuracy) -> Comparison:
    from lightship.eval.comparison import compare
    from lightship.eval.settling import looks_of

    looks = looks_of(before, work.recipe.accuracy)
    return work.stage("comparison", Comparison, lambda: compare(before, after, looks, before.planned))


@task(cache_policy=NO_CACHE)
def decide(work: Release, tracker: Tracker) -> Verdict:
    from lightship.eval import gate
    from lightship.eval.evidence import read_champion, read_measured

    def run() -> Verdict:
        policy = work.recipe.gate
        name = tracker.champion_release(work.recipe.model) if policy.by_champion else None
        champion = read_champion(work.home, name, work.release_id)
        return gate.decide(policy, read_measured(work.directory), champion)

    return work.stage("verdict", Verdict, run)


@task(cache_policy=NO_CACHE)
def promote_champion(work: Release, tracker: Tracker) -> Promoted:
    from lightship.promotion import promote

    return work.stage("promoted", Promoted, lambda: promote(work.directory, work.recipe.model, tracker))


@task(cache_policy=NO_CACHE)
def write_report(work: Release) -> Path:
    from lightship.eval import report
    from lightship.eval.evidence import read_evidence

    path = work.directory / "report.html"
    report.write_report(path, read_evidence(work.directory))
    return path


@task(cache_policy=NO_CACHE)
def write_receipt(work: Release, verdict: Verdict) -> list[Path]:
    from lightship.eval.evidence import leave_receipt

    return leave_receipt(work.directory, verdict)
