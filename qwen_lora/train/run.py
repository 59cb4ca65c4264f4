"""Stage 2 from end to end: `train(settings)`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwen_lora.config.schema import Settings
from qwen_lora.errors import QwenLoraError, Stopped
from qwen_lora.train.run_folder import RunFolder, TrainResult, find_checkpoint, open_run

if TYPE_CHECKING:
    from qwen_lora.lifeline import Lifeline
    from qwen_lora.models import ModelFolder
    from qwen_lora.train.assemble import DataPlan, Trainable
    from qwen_lora.train.checkpoint import Checkpoint, RunFacts, TrainState
    from qwen_lora.train.metrics import MetricsFile
    from qwen_lora.train.preview_plan import PreviewPlan
    from qwen_lora.train.ranks import Ranks
    from qwen_lora.train.report import Report
    from qwen_lora.train.sources import Sources

__all__ = ["TrainResult", "train"]


def train(settings: Settings, restart: bool = False) -> TrainResult:
    """Train a LoRA on a shard set, or continue the run in `output_dir` from its last checkpoint.

    restart: forget an earlier run in `output_dir` first. Under `accelerate launch`, `torchrun` or
    `--num-processes` every process calls this and all get the same result.

    Returns where the LoRA file is (diffusers' layout) and of how many optimizer steps.
    Raises InputError for what the user can put right (settings, model, shards, a changed setting on
    resume), ShardError for damaged records, QwenLoraError for a loss that is not finite, Stopped
    after SIGTERM or SIGINT, when the state is saved.
    """
    from qwen_lora.lifeline import join_processes

    lifeline = join_processes()
    with lifeline.guard() as ends:
        try:
            return _train(settings, restart, lifeline, ends)
        except Stopped as error:
            stopped = error  # every rank has it and the state is saved: a proper end
    raise stopped


def _train(settings: Settings, restart: bool, lifeline: Lifeline, ends: ExitStack) -> TrainResult:
    from qwen_lora.train import assemble
    from qwen_lora.train.compiling import settle_compile
    from qwen_lora.train.cost.settle import settle_way
    from qwen_lora.train.preview_plan import settle_previews
    from qwen_lora.train.ranks import start_ranks
    from qwen_lora.train.report import open_report
    from qwen_lora.train.resume import check_resume, check_same_start
    from qwen_lora.train.sources import open_sources
    from qwen_lora.train.trackers import check_trackers

    check_trackers(settings)
    ranks = start_ranks(settings, lifeline)
    ends.callback(ranks.close)
    check_same_start(ranks, settings)
    with open_run(ranks, settings, restart) as run:
        found = find_checkpoint(ranks, run, settings)
        if not found:
            ranks.on_main(run.refuse_to_overwrite)
        recorded = found.facts if found else None
        pinned = recorded.generations if recorded else None
        with open_sources(ranks, settings, pinned) as sources:
            model = assemble.find_model(ranks, settings, sources.manifests)
            plan = assemble.plan_data(ranks, settings, sources, recorded)
            facts = assemble.run_facts(ranks, settings, sources, model, plan, recorded)
            ranks.check_equal(facts.plan_id, "the plan of the samples")
            if found:
                check_resume(run.path, found.facts, facts, settings, found.state.step)
                if done := _already_done(ranks, run, found, settings):
                    return done
            drawn = settle_previews(ranks, settings, sources, plan, model.family)
            ranks.on_main(lambda: run.write_settings(settings))
            settings = settle_compile(settings, ranks.device, recorded)
            way = settle_way(
                settings,
                model,
                plan.table,
                plan.rule,
                ranks.device,
                recorded,
                quiet=not ranks.is_main,
                world=ranks.world,
            )
            facts = assemble.chosen_here(settings, facts, way)
            trainable = assemble.build_trainable(ranks, settings, model, facts, way, found)
            report = open_report(ranks, run, settings, sources, plan, model, trainable)
            job = _Job(ranks, run, settings, sources, model, plan, facts, trainable, found, report)
            state = _loop(job, drawn)
            _export(job, state)
            if report:
                report.write(state, "done")
            return TrainResult(run.lora, state.step, found.state.step if found else None)


def _already_done(
    ranks: Ranks, run: RunFolder, found: Checkpoint, settings: Settings
) -> TrainResult | None:
    """A finished run that is started again says so, without loading the model."""
    step = found.state.step
    if step < settings.max_train_steps or ranks.on_main(run.result_step) != step:
        return None
    if ranks.is_main:
        print(
            f"{run.path} is done: {step} steps, {run.lora}. A larger max_train_steps continues it, "
            "--restart starts over",
            file=sys.stderr,
        )
    return TrainResult(run.lora, step, resumed_from=step, already_done=True)


@dataclass(frozen=True)
class _Job:
    """What a run consists of, once nothing is left to refuse."""

    ranks: Ranks
    run: RunFolder
    settings: Settings
    sources: Sources
    model: ModelFolder
    plan: DataPlan
    facts: RunFacts
    trainable: Trainable
    found: Checkpoint | None
    report: Report | None


def _loop(job: _Job, drawn: PreviewPlan | None) -> TrainState:
    """Train from the cursor to the last step."""
    from qwen_lora.train.assemble import build_loaders, say_what_runs, snapshot
    from qwen_lora.train.checkpoint import TrainState
    from qwen_lora.train.loop import Loop, LoopParts
    from qwen_lora.train.metrics import MetricsFile
    from qwen_lora.train.previews import build_previews
    from qwen_lora.train.trackers import Trackers

    ranks, run, settings, trainable = job.ranks, job.run, job.settings, job.trainable
    state = job.found.state if job.found else TrainState()
    loader, measure = build_loaders(ranks, settings, job.sources, job.model, job.plan, trainable)
    ranks.check_equal(loader.plan(state.epoch).hash, "the plan of the epoch")
    metrics = MetricsFile(run.metrics if ranks.is_main else None)
    ranks.on_main(lambda: _drop_later_lines(job, metrics, state.step))
    previews = build_previews(
        ranks, run, job.model, trainable, drawn, in_step=settings.shard_base != "none"
    )
    trackers = Trackers(ranks.accelerator, settings)

    def publish(now: TrainState) -> None:
        def write() -> None:
            run.store.save(snapshot(trainable, job.facts, now), settings.checkpoints_total_limit)

        ranks.on_main(write)

    say_what_runs(ranks, settings, job.plan, trainable, state.step)
    parts = LoopParts(
        settings,
        ranks,
        trainable.stepper,
        loader,
        measure,
        metrics,
        trackers,
        publish,
        previews,
        job.report,
    )
    try:
        return Loop(parts, state).run()
    finally:
        trackers.close()


def _drop_later_lines(job: _Job, metrics: MetricsFile, step: int) -> None:
    """Curves and pictures go on from the checkpoint; without one they begin again."""
    try:
        if job.found:
            metrics.continue_from(step)
            job.run.previews.continue_from(step)
        else:
            metrics.clear()
            job.run.previews.clear()
    except OSError as error:
        raise QwenLoraError(
            f"cannot write into {job.run.path}: {error}; the checkpoints are intact, free some "
            "space and run the same command again"
        ) from error


def _export(job: _Job, state: TrainState) -> None:
    """Write lora.safetensors, then result.json and loss.png, by rank 0."""
    from qwen_lora.train.export import save_lora
    from qwen_lora.train.plot import plot_loss

    run, settings, facts, model = job.run, job.settings, job.facts, job.model
    trainable = job.trainable
    provenance = {
        "steps": state.step,
        "settings": facts.settings,
        "shards": [
            {"fingerprint": fingerprint, "generation": generation}
            for fingerprint, generation in zip(facts.fingerprints, facts.generations, strict=True)
        ],
        "base_model": {
            "id": model.model_id,
            "revision": model.revision,
            "fingerprint": facts.base_model,
            **({"file": model.transformer_file.name} if model.transformer_file else {}),
        },
    }

    def write() -> None:
        try:
            write_results()
        except OSError as error:
            raise QwenLoraError(
                f"cannot write the results into {run.path}: {error}; the checkpoints are intact, "
                "free some space and run the same command again"
            ) from error

    def write_results() -> None:
        save_lora(run.lora, trainable.transformer, trainable.spec, settings.save_dtype, provenance)
        run.write_result(state.step)
        if run.metrics.exists():
            plot_loss(run.metrics, run.plot)

    job.ranks.on_main(write)
