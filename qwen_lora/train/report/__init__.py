"""RUN/report.html: a run on one page, from what its folder and its shards hold.

    facts.py      what there is to tell, as plain values
    charts.py     lines as SVG
    pictures.py   pictures as data URIs
    page.py       all of it as HTML, with style.py

A report that cannot be drawn is a warning, never the end of a run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen_lora import __version__
from qwen_lora.config.schema import Settings
from qwen_lora.posix import write_atomic
from qwen_lora.train.metrics import read_metrics
from qwen_lora.train.report.facts import Curves, DataFacts, by_name, data_facts, setting_lines
from qwen_lora.train.report.page import Drawn, LoraFacts, Page, render
from qwen_lora.train.report.pictures import Copies
from qwen_lora.train.run_folder import RunFolder

if TYPE_CHECKING:
    from qwen_lora.models import ModelFolder
    from qwen_lora.train.assemble import DataPlan, Trainable
    from qwen_lora.train.checkpoint import TrainState
    from qwen_lora.train.preview_files import PreviewFiles
    from qwen_lora.train.ranks import Ranks
    from qwen_lora.train.sources import Sources

COLUMNS, ROWS = 8, 16  # most steps and prompts that the page shows
SIDES = (256, 192, 144, 112)  # pixels of a drawn picture: the largest that fits the budget
PICTURE_BYTES = 1_200_000  # of all drawn pictures together


def open_report(
    ranks: Ranks,
    run: RunFolder,
    settings: Settings,
    sources: Sources,
    plan: DataPlan,
    model: ModelFolder,
    trainable: Trainable,
) -> Report | None:
    """The run's report on rank 0, None elsewhere."""
    if not ranks.is_main:
        return None
    from qwen_lora.train.lora import lora_layers

    spec = trainable.spec
    lora = LoraFacts(
        rank=spec.rank,
        alpha=spec.alpha,
        targets=spec.targets if isinstance(spec.targets, str) else ", ".join(spec.targets),
        layers=len(lora_layers(trainable.transformer)),
        parameters=sum(parameter.numel() for _, parameter in trainable.parameters),
        file_bytes=None,
        dtype=settings.save_dtype,
    )
    processes = f", {ranks.world} processes" if ranks.world > 1 else ""
    machine = f"{str(trainable.dtype).removeprefix('torch.')} on {ranks.device.type}{processes}"
    return Report(run, settings, sources, plan, model, lora, machine)


@dataclass
class Report:
    """Writes the page of one run; only rank 0 has one."""

    run: RunFolder
    settings: Settings
    sources: Sources
    plan: DataPlan
    model: ModelFolder
    lora: LoraFacts  # its file's size is looked up at each writing
    machine: str
    _copies: Copies = field(default_factory=Copies)
    _said: set[str] = field(default_factory=set)

    def write(self, state: TrainState, status: str) -> None:
        """status: running, stopped or done. Prints a warning when anything goes wrong."""
        try:
            page = render(self._page(state, status))
            write_atomic(self.run.report, page.encode())
        except Exception as error:  # the run is worth more than its picture
            line = f"{self.run.report} was not written: {type(error).__name__}: {error}"
            if line not in self._said:
                self._said.add(line)
                print(f"warning: {line}", file=sys.stderr)

    def _page(self, state: TrainState, status: str) -> Page:
        rows = read_metrics(self.run.metrics) if self.run.metrics.exists() else []
        changed, default = setting_lines(self.settings, self.model.model_id)
        return Page(
            name=by_name(self.run.path),
            state=status,
            step=state.step,
            steps=self.settings.max_train_steps,
            model=self.model.model_id,
            revision=self.model.revision,
            pipeline=self.model.family.pipeline_class,
            written=datetime.now(UTC).strftime("%Y-%m-%d at %H:%M UTC"),
            version=__version__,
            epoch=state.epoch,
            machine=self.machine,
            curves=Curves(rows),
            data=self._data,
            lora=self._lora(),
            drawn=drawn(self.run.previews, self._copies),
            changed=changed,
            default=default,
        )

    @cached_property
    def _data(self) -> DataFacts:
        """Read once: a run's samples do not change."""
        maps = (shard_set.rgb_map() for shard_set in self.sources.sets)
        rgb = next((found for found in maps if found is not None), None)
        return data_facts(self.plan, self.sources, rgb)

    def _lora(self) -> LoraFacts:
        path = self.run.lora
        size = path.stat().st_size if path.exists() else None
        return LoraFacts(**{**vars(self.lora), "file_bytes": size})


def drawn(files: PreviewFiles, copies: Copies) -> Drawn | None:
    """The previews of a run; None without any. A row is a prompt of the newest step."""
    every = files.steps()
    if not every:
        return None
    steps = spread(every, COLUMNS)
    facts = {step: files.read_facts(step) for step in steps}
    prompts = _prompts(facts[steps[-1]])
    shown = prompts[:ROWS]
    for side in SIDES:
        rows = [
            (prompt, [_picture(files, copies, step, facts[step], prompt, side) for step in steps])
            for prompt in shown
        ]
        if sum(len(uri) for _, uris in rows for uri in uris if uri) <= PICTURE_BYTES:
            break
    return Drawn(
        steps=steps,
        rows=rows,
        how=_how(facts[steps[-1]]),
        exact=facts[steps[-1]].get("decoder") == "vae",
        prompts_left_out=len(prompts) - len(shown),
        steps_left_out=len(every) - len(steps),
    )


def spread(steps: list[int], most: int) -> list[int]:
    """At most so many of `steps`, evenly, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]


def _picture(
    files: PreviewFiles, copies: Copies, step: int, facts: dict[str, Any], prompt: str, side: int
) -> str | None:
    """An earlier start may have drawn other prompts at this step."""
    prompts = _prompts(facts)
    if prompt not in prompts:
        return None
    return copies.of(files.path(step) / f"{prompts.index(prompt):03d}.png", side)


def _prompts(facts: dict[str, Any]) -> list[str]:
    prompts = facts.get("prompts")
    return [str(prompt) for prompt in prompts] if isinstance(prompts, list) else []


def _how(facts: dict[str, Any]) -> str:
    size = facts.get("size")
    pixels = f", {size[0]} × {size[1]} px" if isinstance(size, list) and len(size) == 2 else ""
    guidance = facts.get("guidance", 1)
    guided = f"guidance {guidance:g}" if isinstance(guidance, int | float) else "guidance"
    guided = "no guidance" if guidance == 1 or guidance == 0 else guided
    return f"seed {facts.get('seed')}, {facts.get('inference_steps')} steps, {guided}{pixels}"
